"""What the runs of a pilot depend on, as text that is the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kappa_lightning.fingerprint import fingerprint, hash_of_text
from kappa_lightning.pilot.trial import Setup


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


def settings_of(setup: Setup, module: pl.LightningModule) -> dict[str, Any]:
    """What a run depends on, as far as it can be told; candidates may come and go."""
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
        "trainer": {name: _told(value) for name, value in sorted(setup.trainer.items())},
    }
