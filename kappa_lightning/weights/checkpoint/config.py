"""The config beside a checkpoint, which says what model it is of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class NoModelError(Exception):
    """There is no model to take the layers from; the message says why, as the beginning of a sentence."""


class Loaded(Protocol):
    """The tensors of a checkpoint by the names that they have in the loaded model."""

    def __len__(self) -> int: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape in the model."""

    def dtype(self, name: str) -> torch.dtype:
        """Its stored precision."""

    def refusal(self, name: str) -> str | None:
        """Why it cannot be read, if it cannot."""

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Reads it."""


def read_config(folder: Path, count: int) -> dict[str, Any]:
    """The content of ``config.json`` in a folder.

    Args:
        folder: where the checkpoint lies.
        count: how many tensors it has.

    Raises:
        NoModelError: if there is none, or it cannot be this checkpoint's.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise NoModelError("no config.json beside it says what its layers are")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NoModelError(f"the config.json beside it is damaged ({error})") from error
    if not isinstance(content, dict):
        raise NoModelError("the config.json beside it is no mapping")
    if _depth(content) > count:
        raise NoModelError("the config.json beside it is another model's (more layers than the checkpoint has tensors)")
    return content


def _depth(content: Any) -> int:
    """The largest number of layers that a config names, at whatever depth."""
    if not isinstance(content, dict):
        return 0
    named = [value for key, value in content.items() if _LAYERS.search(key) and isinstance(value, int)]
    return max([0, *named, *map(_depth, content.values())])


_LAYERS = re.compile(r"layers?$|^depth$")
# A model is built by code of its own, which fails in its own ways on a config that it does not know.
UNBUILDABLE = (
    ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, RuntimeError, AssertionError,
    ArithmeticError,
)  # fmt: skip


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
