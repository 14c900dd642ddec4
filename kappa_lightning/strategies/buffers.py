"""Buffers, of which every process has its own, such as the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kappa_lightning.weights.sharded import is_sharded


@contextmanager
def those_of_the_first(module: nn.Module) -> Iterator[None]:
    """Give all processes the buffers of rank 0, which are those that a checkpoint holds, and their own back."""
    buffers = [buffer for buffer in module.buffers() if not is_sharded(buffer)]
    own = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for buffer in buffers:
            torch.distributed.broadcast(buffer, src=0)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
