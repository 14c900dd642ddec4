"""The callbacks: choose what trains, watch κ drift, measure what is forgotten, hold on to it, and walk back."""

from kappa_lightning.callbacks.anchor import PretrainedAnchor
from kappa_lightning.callbacks.forgetting import ForgettingEval
from kappa_lightning.callbacks.freeze import KappaFreezeCallback
from kappa_lightning.callbacks.monitor import KappaMonitor
from kappa_lightning.callbacks.sensitivity import SensitivityFreezeCallback
from kappa_lightning.callbacks.trained_only import TrainedOnlyCheckpoint, load_trained, save_full
from kappa_lightning.callbacks.walk_back import WalkBack

__all__ = [
    "ForgettingEval",
    "KappaFreezeCallback",
    "KappaMonitor",
    "PretrainedAnchor",
    "SensitivityFreezeCallback",
    "TrainedOnlyCheckpoint",
    "WalkBack",
    "load_trained",
    "save_full",
]
