"""KappaTune beyond Lightning's Trainer: a function for Fabric and plain loops, callbacks for transformers' Trainer.

from kappa_lightning.integrations import freeze
from kappa_lightning.integrations.huggingface import KappaFreeze, Retention
"""

from kappa_lightning.integrations.freezing import Frozen, freeze

__all__ = ["Frozen", "freeze"]
