"""The three callbacks: freeze by condition number, watch it drift, and measure what is forgotten."""

from kappa_lightning.callbacks.forgetting import ForgettingEval
from kappa_lightning.callbacks.freeze import KappaFreezeCallback
from kappa_lightning.callbacks.monitor import KappaMonitor

__all__ = ["ForgettingEval", "KappaFreezeCallback", "KappaMonitor"]
