"""A probe on a module, without a trace of it."""

from kappa_lightning.evaluation.adapters import adapters_off, has_adapters
from kappa_lightning.evaluation.batches import Share, SharedBatches
from kappa_lightning.evaluation.evaluate import (
    Circumstances,
    Measurement,
    evaluate_probe,
    measure_probe,
    run_probe,
)
from kappa_lightning.evaluation.intervals import retention, retention_interval
from kappa_lightning.evaluation.items import Items
from kappa_lightning.evaluation.recovery import SameOptimizers, measure_rest, require_recoverable
from kappa_lightning.evaluation.trace import undisturbed

__all__ = [
    "Circumstances",
    "Items",
    "Measurement",
    "SameOptimizers",
    "Share",
    "SharedBatches",
    "adapters_off",
    "evaluate_probe",
    "has_adapters",
    "measure_probe",
    "measure_rest",
    "require_recoverable",
    "retention",
    "retention_interval",
    "run_probe",
    "undisturbed",
]
