"""Reading from a stream of samples as if it had not been read."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset


def stream_beside(dataset: IterableDataset[Any]) -> IterableDataset[Any]:
    """A copy to read from, since a stream may count in its own attributes, or draw from its own generator.

    Streams that it wraps are copied, too. What cannot be copied, such as an open file, is shared with the stream; of an
    iterator that it holds a warning says so.

    Example:
        >>> class Counted(IterableDataset):
        ...     at = 0
        ...     def __iter__(self):
        ...         while self.at < 3:
        ...             self.at += 1
        ...             yield self.at
        >>> stream = Counted()
        >>> list(stream_beside(stream)), list(stream)
        ([1, 2, 3], [1, 2, 3])
    """
    return _beside(dataset, {})


def _beside(dataset: IterableDataset[Any], made: dict[int, IterableDataset[Any]]) -> IterableDataset[Any]:
    """The copy, of which there is one however often the stream occurs among those that are wrapped."""
    if id(dataset) in made:
        return made[id(dataset)]
    values = _attributes(dataset)
    held = [name for name, value in values.items() if isinstance(value, Iterator)]
    if held:
        rank_zero_warn(
            f"{type(dataset).__name__} holds an iterator ({', '.join(held)}): if it reads on from there, training does "
            "not see the batches that are read now. Make the iterator in __iter__, or give a profile= that was "
            "measured on other batches"
        )
    # Neither by copy.copy nor by its own __getstate__, which are about what is to be pickled.
    beside: IterableDataset[Any] = object.__new__(type(dataset))
    made[id(dataset)] = beside
    for name, value in values.items():
        object.__setattr__(beside, name, _copied(value, made))
    return beside


def _attributes(thing: Any) -> dict[str, Any]:
    """Those in its dict and in its slots."""
    state: Any = object.__getstate__(thing)
    found, slots = state if isinstance(state, tuple) else (state, None)
    return {**(found or {}), **(slots or {})}


def _copied(value: Any, made: dict[int, IterableDataset[Any]]) -> Any:
    if isinstance(value, IterableDataset):
        return _beside(value, made)
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, random.Random | np.random.Generator | np.random.RandomState):
        return copy.deepcopy(value)
    # One level: what they hold may be the data.
    return copy.copy(value) if type(value) in (dict, list, set, deque) else value
