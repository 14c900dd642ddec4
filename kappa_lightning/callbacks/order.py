"""Where a callback stands in the Trainer's list, which decides what it sees of the others' work."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def move_before(trainer: pl.Trainer, callback: Callback, kind: type[Callback]) -> None:
    """Move a callback before the first one of a kind, if it stands behind it.

    To be called from the callback's own ``setup``: those in between have had their turn in that hook, so the loop over
    the list skips and repeats none.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    here = callbacks.index(callback)
    first = next((place for place, other in enumerate(callbacks[:here]) if isinstance(other, kind)), None)
    if first is not None:
        callbacks.insert(first, callbacks.pop(here))
