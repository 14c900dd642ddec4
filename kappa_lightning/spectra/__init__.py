"""A batch of matrices → their condition numbers to a guaranteed relative error; torch only.

The way of a batch: :mod:`api` checks it, :mod:`matrices` orients and scales it, :mod:`ladder` chooses the rungs within
what :mod:`memory` allows, :mod:`few_columns`, :mod:`rungs` and :mod:`dense` are the methods, and each hands back a
:class:`~result.Spectrum`. Parts of a rung: :mod:`factors`, :mod:`rotation`, :mod:`lanczos`, :mod:`ritz` and
:mod:`products`. What makes its bounds hold: :mod:`backward_error`, how far a factor is from its matrix;
:mod:`certificate` and, for few columns, :mod:`deflation`, the argument that a value found is the extreme one;
:mod:`recurrence`, the measurement that lets float32 take part in it; :mod:`random_blocks`, on which all four rest.
"""

from kappa_lightning.spectra.api import (
    check_memory_budget,
    check_options,
    condition_number,
    spectrum,
)
from kappa_lightning.spectra.ladder import SOLVERS, working_bytes
from kappa_lightning.spectra.memory import free_memory
from kappa_lightning.spectra.products import full_precision_products
from kappa_lightning.spectra.result import Spectrum

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
