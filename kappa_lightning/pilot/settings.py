"""What the runs of a pilot depend on, as text that is the same in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import TensorDataset

from kappa_lightning.fingerprint import fingerprint, hash_of_text
from kappa_lightning.pilot.trial import Data, Setup
from kappa_lightning.probes import Probe

_LIGHTNING = frozenset((*vars(pl.LightningModule()), *vars(pl.LightningDataModule())))
"""Attributes that Lightning itself gives to every module, some of which change while it runs."""


def _told(value: Any) -> str:
    """A setting as text that is the same in every process: of an object its class and plain attributes."""
    if value is None or isinstance(value, bool | int | float | str | Path | torch.device | torch.dtype):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_told(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple | set):
        return f"[{', '.join(map(_told, value))}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    plain = (bool, int, float, str, Path)
    own = {name: one for name, one in sorted(getattr(value, "__dict__", {}).items()) if isinstance(one, plain)}
    return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(f'{n}={v!r}' for n, v in own.items())})"


def _plain_of(owner: Any) -> dict[str, str]:
    """The hyperparameters and plain attributes that a user gave an object, which decide what it does."""
    own = {name: one for name, one in vars(owner).items() if not name.startswith("_") and name not in _LIGHTNING}
    plain = {name: _told(one) for name, one in own.items() if isinstance(one, bool | int | float | str)}
    return dict(sorted(({name: _told(one) for name, one in owner.hparams.items()} | plain).items()))


def _told_data(data: Data) -> Any:
    if isinstance(data, pl.LightningDataModule):
        return {"class": f"{type(data).__module__}.{type(data).__qualname__}", **_plain_of(data)}
    return [_told_loader(loader) for loader in data]


def _told_probe(probe: Probe) -> str:
    return f"{_told(probe)} on {_told_loader(probe.dataloader)}"


def _told_loader(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    whole = dataset if dataset is not None else loader
    size = len(whole) if isinstance(whole, Sized) else "?"
    held = _held_by(whole)
    return f"{type(whole).__qualname__} of {size} in batches of {getattr(loader, 'batch_size', '?')}{held}"


def _held_by(whole: Any) -> str:
    """A mark of the tensors that a dataset holds, where they can be seen without asking it for a sample."""
    if isinstance(whole, TensorDataset):
        tensors = list(whole.tensors)
    elif isinstance(whole, list | tuple):
        tensors = [leaf for leaf in tree_flatten(list(whole))[0] if isinstance(leaf, Tensor)]
    else:
        return ""
    return f" ({hash_of_text(' '.join(map(fingerprint, tensors))):016x})"


def settings_of(setup: Setup, module: pl.LightningModule, data: Data, probes: Mapping[str, Probe]) -> dict[str, Any]:
    """What a run depends on, as far as it can be told; candidates may come and go.

    Args:
        setup: of all runs.
        module: as it makes it.
        data: the same.
        probes: the same.
    """
    shapes = " ".join(f"{name}{tuple(parameter.shape)}" for name, parameter in module.named_parameters())
    state = " ".join(fingerprint(tensor) for tensor in (*module.parameters(), *module.buffers()))
    return {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "weights": f"{hash_of_text(f'{shapes} {state}'):016x}",
        "monitor": setup.monitor,
        "steps": setup.steps,
        "evaluations": setup.evaluations,
        "blends": setup.blends,
        "always_train": list(setup.always_train),
        "exclude": list(setup.exclude),
        "draw": setup.draw,
        "hyperparameters": _plain_of(module),
        "data": _told_data(data),
        "probes": {name: _told_probe(probe) for name, probe in probes.items()},
        "trainer": {name: _told(value) for name, value in sorted(setup.trainer.items())},
    }
