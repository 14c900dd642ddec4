"""Optimizers and parameters that are lent for some steps of training, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def lent(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> Iterator[dict[int, Tensor]]:
    """Let optimizers move parameters, of which it yields copies by id, and put both back."""
    starts = {id(parameter): parameter.detach().clone() for parameter in parameters}
    kept = [_Kept(optimizer) for optimizer in optimizers]
    try:
        for optimizer in optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                # A warm-up begins near zero, where nothing would move.
                group["lr"] = group.get("initial_lr", group["lr"])
        yield starts
    finally:
        with torch.no_grad():
            for parameter in parameters:
                parameter.detach().copy_(starts[id(parameter)])
        for each in kept:
            each.restore()


class _Kept:
    """An optimizer's state, groups and attributes, as they were."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.attributes = dict(vars(optimizer))
        self.state = dict(optimizer.state)
        self.groups = [dict(group) for group in optimizer.param_groups]

    def restore(self) -> None:
        attributes = vars(self.optimizer)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
        for group, before in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.clear()
            group.update(before)
