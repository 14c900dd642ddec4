"""One tensor of a checkpoint: what is known of it, and how it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
        name: its name there.
        shape: its shape.
        dtype: its precision; ``None`` if PyTorch has none like it.
        read: reads it, to the CPU.
        refusal: why it cannot be read, if it cannot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    refusal: str | None = None

    @property
    def has_values(self) -> bool:
        """Whether it holds numbers with a fraction, real or complex, so that it can have singular values."""
        return self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)


class UnchangedFile:
    """A file that must not change between the reading of its names and of its tensors.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._look()

    def require_unchanged(self) -> None:
        """Make sure that it is the same file, as long as it was.

        Raises:
            ValueError: if it was replaced, written to or cut short meanwhile.
        """
        if self._look() != self._state:
            raise ValueError(f"{self.path} was changed while it was read: wait until it is complete and start again")

    def _look(self) -> tuple[int, int, int] | None:
        try:
            state = os.stat(self.path)
        except FileNotFoundError:
            return None
        return state.st_ino, state.st_size, state.st_mtime_ns


def with_quantized_refused(file: Path | str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a file, in which those that hold codes instead of numbers are marked as unreadable."""
    return {
        name: _refused(file, tensor) if _is_quantized(tensor, tensors) else tensor for name, tensor in tensors.items()
    }


def _refused(file: Path | str, tensor: Stored) -> Stored:
    reason = (
        f"{tensor.name} in {file} is stored as {tensor.dtype or 'an unknown type'}, quantized: load the model with its "
        "library and use KappaProfile.from_model"
    )
    return Stored(tensor.name, tensor.shape, tensor.dtype, tensor.read, reason)


def _is_quantized(tensor: Stored, tensors: Mapping[str, Stored]) -> bool:
    """Whether a tensor holds codes: 8-bit integers, an integer weight, or numbers with a scale of their own."""
    dtype = tensor.dtype
    if len(tensor.shape) < 2 or dtype == torch.bool:
        return False
    if dtype is None or not tensor.has_values:
        return dtype is None or dtype.itemsize == 1 or tensor.name.endswith("weight")
    return dtype.itemsize == 1 and any(f"{tensor.name}{end}" in tensors for end in ("_scale_inv", "_scale"))
