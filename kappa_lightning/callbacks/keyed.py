"""The key of a callback's state in a checkpoint, and what is said of two callbacks that would share one."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class Keyed(Callback):
    """A callback whose key in a checkpoint is made of its arguments, and that says itself what is wrong with an equal.

    Lightning compares the keys when a Trainer is made, and refuses two equal ones in words that don't tell what to do.
    So the second of two equals has a number in its key until its ``setup``, in which :meth:`refuse_equals` tells it;
    from then on each key is that of the arguments alone, under which a resume looks for the state.
    """

    _number: int | None = None
    _is_set_up = False

    @property
    def own_key(self) -> str:
        """The key that the arguments make."""
        return type(self).__qualname__

    @property
    @override
    def state_key(self) -> str:
        key = self.own_key
        if self._is_set_up:
            return key
        if self._number is None:
            self._number = 1 + sum(other.own_key == key for other in _WAITING)
            _WAITING.add(self)
        return key if self._number == 1 else f"{key} ({self._number})"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._is_set_up = True
        _WAITING.discard(self)

    def refuse_equals(self, trainer: pl.Trainer, consequence: str, remedy: str) -> None:
        """Make sure that no other callback of the Trainer has the same key.

        Args:
            trainer: whose callbacks are looked at.
            consequence: what two of them would do, for the message.
            remedy: what to do instead.

        Raises:
            ValueError: if one has.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            if other is not self and isinstance(other, Keyed) and other.own_key == self.own_key:
                twice = "twice" if repr(other) == repr(self) else f"beside {other!r}"
                raise ValueError(f"this Trainer has {self!r} {twice}, {consequence}: leave one out, or {remedy}")


_WAITING: WeakSet[Keyed] = WeakSet()
"""Those whose key has been asked for, and that have not been set up yet."""
