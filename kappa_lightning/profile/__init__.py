"""A model's condition numbers, one row a tensor: computed, saved, checked against weights, and selected from."""

from kappa_lightning.profile.profile import KappaProfile
from kappa_lightning.profile.row import KappaRow

__all__ = ["KappaProfile", "KappaRow"]
