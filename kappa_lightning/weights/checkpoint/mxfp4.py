"""Fused experts that a checkpoint stores in MXFP4, as gpt-oss does: blocks of 4-bit numbers that share a scale.

"OCP Microscaling Formats (MX) Specification", version 1.0, section 5.3.3: an element is an FP4 number (E2M1), a
block of 32 has one power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from kappa_lightning.weights.checkpoint.stored import Stored

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127


def with_mxfp4_dequantized(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a checkpoint, in which each pair of blocks and scales is the bfloat16 tensor that it stands for.

    ``<name>_blocks`` of shape (experts, rows, blocks, 16) and ``<name>_scales`` of shape (experts, rows, blocks), both
    of bytes, become ``<name>`` of shape (experts, 32 · blocks, rows), which is how transformers' gpt-oss has it.
    """
    found: dict[str, Stored] = {}
    pairs = {name: pair for name in tensors if (pair := _pair(name, tensors)) is not None}
    partners = {scales.name for _, scales in pairs.values()}
    for name, stored in tensors.items():
        if name in pairs:
            whole = name.removesuffix("_blocks")
            blocks, scales = pairs[name]
            experts, rows, count, width = blocks.shape
            shape = (experts, 2 * count * width, rows)
            found[whole] = Stored(whole, shape, torch.bfloat16, partial(_read, blocks, scales))
        elif name not in partners:
            found[name] = stored
    return found


def _pair(name: str, tensors: Mapping[str, Stored]) -> tuple[Stored, Stored] | None:
    blocks, scales = tensors[name], tensors.get(f"{name.removesuffix('_blocks')}_scales")
    is_pair = (
        name.endswith("_blocks")
        and scales is not None
        and len(blocks.shape) == 4
        and blocks.shape[:3] == scales.shape
        and blocks.dtype == scales.dtype == torch.uint8
    )
    return (blocks, scales) if is_pair and scales is not None else None


def _read(blocks: Stored, scales: Stored) -> Tensor:
    """Expert by expert, since the numbers take four times the memory of their codes."""
    codes, exponents = blocks.read(), scales.read()
    values = torch.tensor(_VALUES, dtype=torch.bfloat16)
    experts, rows, count, width = codes.shape
    result = torch.empty((experts, 2 * count * width, rows), dtype=torch.bfloat16)
    for expert in range(experts):
        code = codes[expert].int()
        # The low four bits come first.
        numbers = values[torch.stack((code & 15, code >> 4), dim=-1)].flatten(-2)
        scaled = torch.ldexp(numbers, exponents[expert].int().unsqueeze(-1) - _BIAS)
        result[expert] = scaled.reshape(rows, -1).T
    return result
