"""A probe on a module, without a trace of it."""

from kappa_lightning.evaluation.batches import Share, SharedBatches
from kappa_lightning.evaluation.evaluate import Circumstances, evaluate_probe, run_probe
from kappa_lightning.evaluation.trace import undisturbed

__all__ = ["Circumstances", "Share", "SharedBatches", "evaluate_probe", "run_probe", "undisturbed"]
