"""A ``.safetensors`` file written tensor by tensor, of which only one is in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kappa_lightning.files import replacing

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: str | os.PathLike[str],
    described: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a file of the safetensors format (https://github.com/huggingface/safetensors#format), atomically.

    Args:
        path: the file.
        described: shape and precision of every tensor, in the order in which they come.
        tensors: names and values.

    Raises:
        ValueError: if a tensor has a precision that the format lacks, or is not what was described.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(f"{folder}/a.safetensors", {"a": ((2,), torch.float32)}, [("a", torch.ones(2))])
        ...     load_file(f"{folder}/a.safetensors")
        {'a': tensor([1., 1.])}
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in described.items():
        if dtype not in _NAMES:
            raise ValueError(f"{name} is stored as {dtype}, which safetensors has no name for")
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    names = iter(described)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in tensors:
            if name != next(names, None) or (tuple(tensor.shape), tensor.dtype) != described[name]:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} ({tensor.dtype}) is not what was described")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if (left := next(names, None)) is not None:
            raise ValueError(f"{left} was described and did not come")
