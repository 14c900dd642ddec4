"""The tensors of a ``.safetensors`` file that is read by ranges of bytes: one far away, or larger than memory maps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.weights.checkpoint.stored import Stored

Read = Callable[[int, int], bytes | bytearray]
"""Returns the bytes of a file from a position up to another."""

_LONGEST_HEADER = 100_000_000  # as the library has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""The precisions of the format that PyTorch has, by their names there."""


def read_by_ranges(file: str, size: int, read: Read) -> dict[str, Stored]:
    """The tensors of a file by their names; its header is read now, and each tensor's bytes when it is asked for.

    The format is that of https://github.com/huggingface/safetensors#format.

    Args:
        file: its name, for messages.
        size: its bytes.
        read: reads some of them.

    Raises:
        ValueError: if it is corrupt or truncated.
    """
    header, start = _header(file, size, read)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(file, item[1])):
        begin, stop = _offsets(file, entry)
        shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
        sizes = all(isinstance(length, int) and length >= 0 for length in shape)
        if begin != end or not sizes or (dtype is not None and stop - begin != math.prod(shape) * dtype.itemsize):
            raise _corrupt(file, f"{name} does not lie where its header says")
        end = stop
        reads = partial(_read, file, read, start + begin, start + stop, shape, dtype)
        tensors[name] = Stored(name, shape, dtype, reads)
    if start + end != size:
        raise _corrupt(file, f"it has {size} bytes, and its header tells of {start + end}")
    return dict(sorted(tensors.items()))  # the order in which the library gives them


def _header(file: str, size: int, read: Read) -> tuple[dict[str, dict[str, Any]], int]:
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else size
    if length > min(size - 8, _LONGEST_HEADER):
        raise _corrupt(file, "its header is longer than the file")
    try:
        header = json.loads(bytes(read(8, 8 + length)).decode())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(file, "its header is damaged") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is damaged")
    header.pop("__metadata__", None)
    return header, 8 + length


def _offsets(file: str, entry: Any) -> tuple[int, int]:
    try:
        begin, stop = entry["data_offsets"]
        if not (0 <= begin <= stop and isinstance(entry["shape"], list) and isinstance(entry["dtype"], str)):
            raise ValueError(entry)
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, "its header is damaged") from error
    return begin, stop


def _read(file: str, read: Read, begin: int, stop: int, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    content = read(begin, stop)
    if len(content) != stop - begin:
        raise _corrupt(file, f"{len(content)} of {stop - begin} bytes came")
    with torch.device("cpu"):
        if not content:
            return torch.empty(shape, dtype=dtype)
        # A copy of bytes, which PyTorch would not write to.
        buffer = content if isinstance(content, bytearray) else bytearray(content)
        return torch.frombuffer(buffer, dtype=dtype or torch.uint8).reshape(shape)


def _corrupt(file: str, reason: str) -> ValueError:
    return ValueError(f"{file} is corrupt or truncated ({reason}): download it again")
