"""A parameter as its layer uses it, whose gradient goes to the parts that train and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.weights.part import Index


class _Join(torch.autograd.Function):
    """The whole tensor, as a function of parts that lie in its memory."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, indices: Sequence[Index], *parts: Tensor) -> Tensor:
        ctx.indices = indices
        # The parts' entries are in it already: they share its memory, so nothing is copied.
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        needed = ctx.needs_input_grad[2:]
        # Copies, since a view would keep the whole gradient alive for as long as the part has one.
        parts = (gradient[index].clone() if need else None for index, need in zip(ctx.indices, needed, strict=True))
        return None, None, *parts


@torch.compiler.disable  # type: ignore[untyped-decorator]
def join(whole: Tensor, indices: Sequence[Index], parts: Sequence[Tensor]) -> Tensor:
    """``whole``, differentiable in its parts alone.

    Args:
        whole: the parameter, of any shape; it requires no gradient.
        indices: where each part lies.
        parts: ``whole[index]`` for each index, sharing its memory.

    Returns:
        A tensor of the memory and the shape of ``whole``. The backward pass computes the gradient of all of it, since
        that is how a product's gradient comes, copies what the parts need and lets go of it.
    """
    joined: Tensor = _Join.apply(whole, indices, *parts)  # type: ignore[no-untyped-call]
    return joined
