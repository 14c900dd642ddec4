"""Tensors whose matrices have one shape, to be decomposed in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kappa_lightning.weights import Weight

# Of each entry of a batch: the stored number, its place in the batch, and both in the next batch.
_WORKING_BYTES = 16


def batches_of_one_shape(weights: Sequence[Weight], budget: int, size: Callable[[Weight], int]) -> list[list[Weight]]:
    """Weights whose matrices have one shape, type and place, in groups that fit a budget, or alone.

    Args:
        weights: in the order in which the groups are begun.
        budget: what the sizes of a group may add up to.
        size: of one weight.
    """
    filling: dict[tuple[object, ...], tuple[list[Weight], int]] = {}
    batches: list[list[Weight]] = []
    for weight in weights:
        _, rows, cols = weight.stack_shape
        key = (rows, cols, weight.dtype, None if weight.parameter is None else weight.parameter.device)
        batch, used = filling.get(key, ([], budget))
        if used + size(weight) > budget:
            batch, used = [], 0
            batches.append(batch)
        batch.append(weight)
        filling[key] = (batch, used + size(weight))
    return batches


def working_bytes_of(weight: Weight) -> int:
    """What a weight takes of a GPU's memory as one of a batch."""
    return math.prod(weight.stack_shape) * _WORKING_BYTES
