"""Candidates on the user's own module and data: which of them keeps most of what the model knew.

The room can be called like its one function, since both have the name that a user would look for:
``kappa_lightning.pilot(...)`` and ``from kappa_lightning.pilot import pilot`` are the same.
"""

import inspect
import sys
from types import ModuleType
from typing import Any

from kappa_lightning.pilot.adapters import LoraAdapters
from kappa_lightning.pilot.candidates import Candidate, candidate
from kappa_lightning.pilot.executor import OutOfTimeError
from kappa_lightning.pilot.rates import RateFactor
from kappa_lightning.pilot.result import PilotResult, Recommendation
from kappa_lightning.pilot.run_pilot import DEFAULT_CANDIDATES, pilot
from kappa_lightning.pilot.train_only import TrainOnly

__all__ = [
    "DEFAULT_CANDIDATES",
    "Candidate",
    "LoraAdapters",
    "OutOfTimeError",
    "PilotResult",
    "RateFactor",
    "Recommendation",
    "TrainOnly",
    "candidate",
    "pilot",
]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> PilotResult:
        return pilot(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
sys.modules[__name__].__signature__ = inspect.signature(pilot)  # type: ignore[attr-defined]
