"""Products of matrices with a few vectors: how they are read, in which precision, and in which form they are fast."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# By name, since torch's stubs do not know all of them.
_BACKENDS: tuple[Any, ...] = tuple(
    getattr(backend, operation)
    for backend, operation in (
        (torch.backends.cuda, "matmul"),
        (torch.backends.cudnn, "conv"),
        (torch.backends.mkldnn, "matmul"),
        (torch.backends.mkldnn, "conv"),
    )
)

Operator = Callable[[Tensor], Tensor]
"""Applies a matrix of order n to vectors as rows: (count, few, n) to the same shape."""


def gram_product(block: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """X ↦ XAᵀA for matrices that are read once, some rows at a time.

    In float32 two threads of a CPU took a quarter less time for 2048×2048 with the vectors as columns in the product
    whose sum runs along the memory; in float64, and in the other product, vectors are faster as rows.

    Args:
        block: X, shape (count, few, n).
        parts: the rows of the A's from top to bottom, in X's dtype, each of shape (count, some, n).

    Returns:
        A new tensor of X's shape.
    """
    by_columns = block.dtype == torch.float32 and block.device.type == "cpu"
    product: Tensor | None = None
    for part in parts:
        rows_are_contiguous = part.stride(-1) == 1
        image = (part @ block.mT).mT if by_columns and rows_are_contiguous else block @ part.mT
        if product is None:
            product = torch.zeros_like(block, memory_format=torch.contiguous_format)
            if by_columns and not rows_are_contiguous:
                product = torch.zeros_like(block.mT, memory_format=torch.contiguous_format).mT
        if by_columns and not rows_are_contiguous:
            product.mT.baddbmm_(part.mT, image.mT)
        else:
            product.baddbmm_(image, part)
    return torch.zeros_like(block) if product is None else product


@contextlib.contextmanager
def full_precision_products(dtype: torch.dtype) -> Iterator[None]:
    """Keep float32 products and convolutions from being rounded, whatever the process has asked for elsewhere.

    The settings are those of the whole process, through PyTorch's newer interface, which knows what the older one
    (``set_float32_matmul_precision``) has set, but not the other way round.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    if dtype != torch.float32 or all(precision == "ieee" for precision in before):
        yield
        return
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision
