"""A parameter as its layer uses it, whose gradient goes to the parts that train and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.weights.part import Index

Reduce = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
"""Makes of the parts' gradients on this process what the parts get."""


class _Join(torch.autograd.Function):
    """The whole tensor, as a function of parts that lie in its memory."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, indices: Sequence[Index], reduce: Reduce | None, *parts: Tensor) -> Tensor:
        ctx.indices, ctx.reduce = indices, reduce
        # The parts' entries are in it already, so nothing is copied.
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        needed = ctx.needs_input_grad[3:]
        parts = [gradient[index] if need else None for index, need in zip(ctx.indices, needed, strict=True)]
        if ctx.reduce is not None:
            return None, None, None, *ctx.reduce(parts)
        # Copies, since a view would keep the whole gradient alive for as long as the part has one.
        return None, None, None, *(None if part is None else part.clone() for part in parts)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def join(whole: Tensor, indices: Sequence[Index], parts: Sequence[Tensor], reduce: Reduce | None = None) -> Tensor:
    """``whole``, differentiable in its parts alone.

    Args:
        whole: the parameter, of any shape; it requires no gradient.
        indices: where each part lies.
        parts: ``whole[index]`` for each index, sharing its memory; where processes share the work, each may have a
            piece of it, in memory of its own.
        reduce: makes of the parts' gradients on this process what they get; by default a copy.

    Returns:
        A tensor of the memory and the shape of ``whole``. The backward pass computes the gradient of all of it, since
        that is how a product's gradient comes, copies what the parts need and lets go of it.
    """
    joined: Tensor = _Join.apply(whole, indices, reduce, *parts)  # type: ignore[no-untyped-call]
    return joined
