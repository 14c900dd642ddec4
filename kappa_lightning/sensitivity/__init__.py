"""What a tensor can learn, and what that would change in what the model says: signal, sensitivity, and a choice."""

from kappa_lightning.sensitivity.profile import SensitivityProfile
from kappa_lightning.sensitivity.row import SensitivityRow
from kappa_lightning.sensitivity.settings import SensitivitySettings

__all__ = ["SensitivityProfile", "SensitivityRow", "SensitivitySettings"]
