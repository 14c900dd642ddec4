"""Weights of which each process holds a part, as FSDP2 and tensor parallelism keep them (``DTensor``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # and what knows of shards takes a second to import
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its entries; of a sharded one a copy, for which all its processes must call this.

    Returns:
        The same shape, a plain tensor on the device of the parts.
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        collected: Tensor = tensor.full_tensor()
    return collected.detach()
