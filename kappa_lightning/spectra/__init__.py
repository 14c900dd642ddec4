"""A batch of matrices → their condition numbers to a guaranteed relative error; torch only.

The way of a batch: :mod:`_spectrum` checks it, :mod:`scaling` orients and scales it, :mod:`ladder` chooses the rungs,
:mod:`factored` and :mod:`svd` are the rungs, :mod:`factor`, :mod:`rotation`, :mod:`lanczos`, :mod:`ritz` and
:mod:`products` their parts, :mod:`certificate` the argument that a value found is the extreme one, :mod:`recurrence`
the measurement that lets float32 take part in it, :mod:`gaussian` the random blocks that both rest on.
"""

from kappa_lightning.spectra._spectrum import (
    Spectrum,
    check_memory_budget,
    check_options,
    condition_number,
    spectrum,
)
from kappa_lightning.spectra.ladder import SOLVERS, free_memory, working_bytes
from kappa_lightning.spectra.products import full_precision_products

__all__ = [
    "SOLVERS",
    "Spectrum",
    "check_memory_budget",
    "check_options",
    "condition_number",
    "free_memory",
    "full_precision_products",
    "spectrum",
    "working_bytes",
]
