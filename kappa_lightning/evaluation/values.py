"""How each kind of value that a module may keep is put back, and what is found inside of it."""

from __future__ import annotations

import argparse
import array
import copy
import ctypes
import io
import itertools
import queue
import random
import sys
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

Undo = Callable[[], None]

UNCHANGEABLE = frozenset({type(None), bool, int, float, complex, str, bytes, type, range, slice, type(...)})
"""Types of which nothing can be changed, nor of anything inside."""

# What has a life of its own beside the module, or holds the data.
_APART = (pl.Trainer, pl.LightningDataModule, pl.Callback, Logger, Dataset, DataLoader, Optimizer, LRScheduler)
_BARE = (types.SimpleNamespace, argparse.Namespace)
# What holds one of these is at work beside the run, such as a writer or a connection.
_SHARED = (threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Event, queue.Queue, io.IOBase)
_IN_MEMORY = (io.BytesIO, io.StringIO)
_MACHINERY = frozenset(
    {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities"}
    | {"wandb", "mlflow", "neptune", "comet_ml", "clearml", "aim", "tensorboardX"}
)
# A copy of one of these goes on where it stands, and leaves the other there; those of itertools up to Python 3.13.
_NOTHING: dict[str, str] = {}
_COPIED: tuple[type, ...] = (
    *map(type, map(iter, (list(_NOTHING), (), "", b"", range(0), _NOTHING, _NOTHING.values(), _NOTHING.items()))),
    *map(type, (iter(set(_NOTHING)), reversed(list(_NOTHING)), reversed(_NOTHING))),
    *((itertools.count,) if sys.version_info < (3, 14) else ()),
)


def is_own(kind: type) -> bool:
    """Whether a class is neither Python's nor of the machinery that trains: a script's, or a model library's."""
    package = kind.__module__.partition(".")[0]
    # A script's own classes are in __main__, which counts as one of Python's modules.
    return package == "__main__" or package not in {*sys.stdlib_module_names, *_MACHINERY}


def is_configuration(value: Any) -> bool:
    """Whether it is one of transformers' configurations, which a generating step may change."""
    kind = type(value)
    return kind.__name__.endswith("Config") and kind.__module__.partition(".")[0] == "transformers"


def is_object(value: Any) -> bool:
    """Whether it is an object with attributes that the module keeps for itself, such as a meter."""
    kind = type(value)
    if is_configuration(value) or kind in _BARE:
        return True
    if isinstance(value, (type, types.ModuleType, *_APART)) or not _has_attributes(kind):
        return False
    if any(isinstance(held, _SHARED) and not isinstance(held, _IN_MEMORY) for held in attributes_of(value).values()):
        return False
    # UserDict and its like are Python's, and made to hold what is somebody's own.
    return is_own(kind) or kind.__module__ == "collections"


def _has_attributes(kind: type) -> bool:
    return any("__dict__" in vars(kin) or vars(kin).get("__slots__") for kin in kind.__mro__)


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object has in its ``__dict__`` and its ``__slots__``."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            name = f"_{kind.__name__.lstrip('_')}{slot}" if slot.startswith("__") and not slot.endswith("__") else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def set_attributes(value: Any, before: Mapping[str, Any]) -> None:
    """Give an object the attributes that it had, and no others."""
    now = attributes_of(value)
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, kept in before.items():
        if name not in now or now[name] is not kept:
            # Also of a frozen dataclass, whose own method refuses.
            object.__setattr__(value, name, kept)


def is_iterator(value: Any) -> bool:
    """Whether reading from it moves it on; a class of a script's is known by its attributes instead."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase | Mapping) and not is_object(value)


def stand_in(name: str, iterator: Iterator[Any]) -> Iterator[Any]:
    """What takes an iterator's place: a copy of it, or if it has none something that gives nothing away."""
    if isinstance(iterator, _COPIED):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of itertools, from Python 3.12
            return copy.copy(iterator)
    return _Unread(name, iterator)


class _Unread(Iterator[Any]):
    """In the place of an iterator that could not be put back."""

    def __init__(self, name: str, iterator: Iterator[Any]) -> None:
        self._name, self._iterator = name, iterator

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise RuntimeError(
            f"evaluating a probe reads from {self._name}, a {type(self._iterator).__name__} of the module, which "
            "cannot be put back to where it stood: let the probe's step read its data from the batch, or from an "
            "iterator that it makes itself"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def undo_of(value: Any) -> Undo | None:
    """What puts a value's own state back, without that of what it holds; ``None`` if there is nothing to put back."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())  # type: ignore[return-value]
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return partial(setattr, bits, "state", bits.state)
    if isinstance(value, np.ndarray):
        # One in a file is a dataset.
        whole = value.flags.writeable and not isinstance(value, np.memmap)
        return partial(value.__setitem__, ..., value.copy()) if whole else None
    if isinstance(value, bytearray | array.array):
        return partial(value.__setitem__, slice(None), value[:])
    if isinstance(value, memoryview | ctypes.Array | ctypes.Structure | ctypes._SimpleCData):
        return _undo_memory(value)
    if isinstance(value, _IN_MEMORY):
        return None if value.closed else partial(value.__setstate__, value.__getstate__())  # type: ignore[union-attr]
    if isinstance(value, list | deque):
        return partial(_set_items, value, list(value))
    if isinstance(value, dict):
        return partial(set_entries, value, dict(value))
    if isinstance(value, set):
        return partial(_set_members, value, set(value))
    if isinstance(value, weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
        return partial(set_entries, value, dict(value.items()))
    if isinstance(value, weakref.WeakSet):
        return partial(_set_members, value, set(value))
    if isinstance(value, types.CellType):
        return _undo_cell(value)
    if is_object(value):
        return partial(set_attributes, value, attributes_of(value))
    return None


Held = tuple[str, Any, Callable[[Any], None] | None]
"""The end of a name, what is held under it, and a function that exchanges it for something else, if there is one."""


def inside(value: Any) -> Iterator[Held]:
    """What a value holds."""
    if isinstance(value, list | deque):
        yield from (("", item, partial(value.__setitem__, place)) for place, item in enumerate(list(value)))
    elif isinstance(value, tuple | frozenset | set | weakref.WeakSet):
        yield from (("", item, None) for item in list(value))
    elif isinstance(value, MutableMapping) and _is_plain(value):
        yield from ((f".{key}", entry, partial(value.__setitem__, key)) for key, entry in list(value.items()))
    elif isinstance(value, types.MappingProxyType):
        yield from ((f".{key}", entry, None) for key, entry in value.items())
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            yield from (("", item, None) for item in value.flat)
    elif isinstance(value, types.FunctionType):
        # What a hook collects into.
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f".{name}", cell, None
    elif isinstance(value, types.CellType):
        if _is_filled(value):
            yield "", value.cell_contents, partial(setattr, value, "cell_contents")
    elif isinstance(value, types.MethodType):
        yield "", value.__self__, None
        yield "", value.__func__, None
    elif isinstance(value, partial):
        yield from (("", held, None) for held in (value.func, *value.args, *value.keywords.values()))
    # Of a dict or a list with attributes of its own, too. Settings of a configuration are replaced, never changed.
    if is_object(value) and not is_configuration(value):
        for name, held in attributes_of(value).items():
            yield f".{name}", held, partial(object.__setattr__, value, name)


def _is_plain(value: MutableMapping[Any, Any]) -> bool:
    return isinstance(value, dict | weakref.WeakKeyDictionary | weakref.WeakValueDictionary)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading an empty one raises
    except ValueError:
        return False
    return True


def _undo_cell(cell: types.CellType) -> Undo:
    if not _is_filled(cell):
        return partial(_empty, cell)
    before = cell.cell_contents

    def undo() -> None:
        if not _is_filled(cell) or cell.cell_contents is not before:
            cell.cell_contents = before

    return undo


def _empty(cell: types.CellType) -> None:
    if _is_filled(cell):
        del cell.cell_contents


def _undo_memory(value: Any) -> Undo | None:
    view = memoryview(value)
    if view.readonly or not view.c_contiguous:
        return None
    octets = view.cast("B")
    return partial(octets.__setitem__, slice(None), octets.tobytes())


def _set_items(kept: list[Any] | deque[Any], items: list[Any]) -> None:
    if len(kept) != len(items) or any(now is not before for now, before in zip(kept, items, strict=True)):
        kept.clear()
        kept.extend(items)


def set_entries(kept: MutableMapping[Any, Any], entries: Mapping[Any, Any]) -> None:
    """Give a mapping the entries that it had, and no others, in their order."""
    if list(kept) != list(entries) or any(kept[key] is not entry for key, entry in entries.items()):
        kept.clear()
        kept.update(entries)


def _set_members(kept: set[Any] | weakref.WeakSet[Any], members: set[Any]) -> None:
    if set(kept) != members:
        kept.clear()
        kept.update(members)
