"""The tensors of a ``.safetensors`` file, which is opened once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.weights.checkpoint.stored import Stored, UnchangedFile, with_quantized_refused


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file by their names; only its header is read until one is asked for.

    Raises:
        ValueError: if it is corrupt or truncated.
    """
    from safetensors import SafetensorError, safe_open

    unchanged = UnchangedFile(file)
    try:
        # Stays open as long as one of its tensors may be read: opening it for each takes longer than small ones do.
        opened: Any = safe_open(file, framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        described = {name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype())) for name, s in slices.items()}
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


_DTYPES = {
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
