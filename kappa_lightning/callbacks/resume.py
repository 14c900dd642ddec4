"""How a fit begins: fresh, resumed from a checkpoint, or as one more fit of a module that is trained by now."""

from __future__ import annotations

import os
import weakref
from enum import Enum, auto
from typing import Any

import lightning.pytorch as pl
from torch import nn

from kappa_lightning.callbacks.trainer import has_trained


class Start(Enum):
    """How a fit begins, for a callback that keeps something of the weights before the first step."""

    FRESH = auto()
    """The callback has not seen the module before."""
    RESUMED = auto()
    """From a checkpoint that holds the callback's state."""
    WITHOUT_STATE = auto()
    """From a checkpoint of weights that have trained, which holds no state of the callback."""
    CONTINUED = auto()
    """``Trainer.fit`` was called once more, with the same module."""
    AGAIN = auto()
    """A new Trainer, with the module of the callback's last fit."""


class Runs:
    """What a callback knows of its earlier fits and of the checkpoint that is being loaded.

    The callback hands over what Lightning's hooks tell it, in this order: :meth:`announced` from ``setup``,
    :meth:`opened` from ``on_load_checkpoint``, :meth:`loaded` from ``load_state_dict``, :meth:`begun` when it has
    done its work at the start of the fit, :meth:`fit_ended` from ``on_fit_end`` or :meth:`ended` from
    ``on_exception``. Its ``state_dict`` gives :meth:`to_save` as long as a fit is only announced, or the callback has
    nothing of its own.

    Attributes:
        state: what :meth:`loaded` was given, until the fit has begun.
        announced_only: whether a fit is about to begin, and the callback's own figures are of an earlier one.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self.announced_only = False
        self._checkpoint_has_trained = False
        self._saved_early = False
        self._module: weakref.ref[nn.Module] | None = None

    def announced(self) -> None:
        """A fit is going to begin; what was loaded before is of no concern to it."""
        self.state = None
        self._checkpoint_has_trained = self._saved_early = False
        self.announced_only = True

    def opened(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is being loaded, whether or not it has a state of the callback."""
        if self._saved_early:
            # A learning-rate finder loads what it saved just before, which says nothing of where the fit comes from.
            self._saved_early = False
            return
        self.state = None
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        batches = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("completed", 0)
        self._checkpoint_has_trained = checkpoint["global_step"] > 0 or batches > 0

    def loaded(self, state: dict[str, Any]) -> None:
        """The checkpoint has this state of the callback; Lightning says so for ``validate`` and the like, too."""
        self.state = state or None

    def to_save(self) -> dict[str, Any]:
        """What the callback saves as long as it has nothing of its own: what was loaded, if anything was.

        A learning-rate finder asks for it before the fit has begun, and whoever saves after a validation.
        """
        self._saved_early = self.announced_only
        return dict(self.state or {})

    def start(self, trainer: pl.Trainer, module: nn.Module, ckpt_path: str | os.PathLike[str] | None) -> Start:
        """How the fit that is beginning begins.

        Args:
            trainer: whose fit it is.
            module: what it trains.
            ckpt_path: the checkpoint that it resumes from.
        """
        if ckpt_path is not None and self.state is not None:
            return Start.RESUMED
        if ckpt_path is not None and self._checkpoint_has_trained:
            return Start.WITHOUT_STATE
        if not self.is_of(module):
            return Start.FRESH
        return Start.CONTINUED if has_trained(trainer) else Start.AGAIN

    def is_of(self, module: nn.Module) -> bool:
        """Whether the callback's last fit trained this module."""
        return self.module is module

    @property
    def module(self) -> nn.Module | None:
        """What the callback's last fit trained, as long as it is there."""
        return None if self._module is None else self._module()

    def begun(self, module: nn.Module) -> None:
        """The fit has begun, and the callback's own figures are of it."""
        self._module = weakref.ref(module)
        self.state = None
        self.announced_only = False

    def fit_ended(self) -> None:
        """The fit has ended well; if nothing was left to train, whoever saves next saves what was loaded."""
        if not self.announced_only or self.state is None:
            self.ended()

    def ended(self) -> None:
        """The fit has ended, well or not."""
        self.state = None
        self._checkpoint_has_trained = self._saved_early = False
        self.announced_only = False

    def __getstate__(self) -> dict[str, Any]:
        # The module is one process' object, and stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"_module": None}
