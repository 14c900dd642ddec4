"""The tensors of a ``.safetensors`` file, which is opened once."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.weights.checkpoint.ranges import DTYPES, read_by_ranges
from kappa_lightning.weights.checkpoint.stored import Stored, UnchangedFile, with_quantized_refused


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file by their names; only its header is read until one is asked for.

    A file that is larger than the machine's memory is read tensor by tensor, any other one is mapped.

    Raises:
        ValueError: if it is corrupt or truncated.
    """
    from safetensors import SafetensorError, safe_open

    unchanged = UnchangedFile(file)
    size = file.stat().st_size
    if size > _physical_memory():
        # The library maps a file as a whole, which Linux refuses then.
        return with_quantized_refused(file, read_by_ranges(str(file), size, partial(_read_range, file, unchanged)))
    try:
        # Stays open as long as one of its tensors may be read: opening it for each takes longer than small ones do.
        opened: Any = safe_open(file, framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        described = {name: (tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}): download it again") from error
    tensors = {
        name: Stored(name, shape, dtype, partial(_read, opened, unchanged, name))
        for name, (shape, dtype) in described.items()
    }
    return with_quantized_refused(file, tensors)


def _read(opened: Any, unchanged: UnchangedFile, name: str) -> Tensor:
    unchanged.require_unchanged()
    with torch.device("cpu"):
        tensor: Tensor = opened.get_tensor(name)
    unchanged.require_unchanged()
    return tensor


def _read_range(file: Path, unchanged: UnchangedFile, begin: int, stop: int) -> bytearray:
    unchanged.require_unchanged()
    content = bytearray(stop - begin)
    with file.open("rb", buffering=0) as opened:
        opened.seek(begin)
        view, filled = memoryview(content), 0
        # The system returns at most 2 GiB at a time.
        while filled < len(content) and (count := opened.readinto(view[filled:])):
            filled += count
    unchanged.require_unchanged()
    return content[:filled] if filled < len(content) else content


def _physical_memory() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf
