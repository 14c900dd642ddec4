"""The learning rate over a run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP = 0.1
"""The share of the steps in which the rate rises."""


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Raise the learning rate linearly over a tenth of the steps, and lower it to zero by a cosine.

    Args:
        optimizer: whose groups each keep their own peak rate.
        steps: optimizer steps of the whole run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule, rates = warmup_cosine(optimizer, 20), []
        >>> for _ in range(20):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 3) for rate in rates[:3]], round(rates[10], 3), schedule.get_last_lr()
        ([0.5, 0.994, 0.976], 0.5, [0.0])
    """
    warmup = max(1, int(WARMUP * steps))

    def scale(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))

    return LambdaLR(optimizer, scale)
