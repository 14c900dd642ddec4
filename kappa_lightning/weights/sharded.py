"""Weights of which each process holds a part, as FSDP2 and tensor parallelism keep them (``DTensor``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed
from torch import Tensor, nn

from kappa_lightning.weights.part import Index, overlap

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # and what knows of shards takes a second to import
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


Place = tuple[tuple[int, ...], tuple[int, ...]]
"""The part of a tensor that a process holds: its offset and its size in each dimension."""


def place_of(tensor: DTensor) -> Place:
    """Where the part of this process lies in the whole."""
    # The method is what distributed checkpoints are made with; each process has one part.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(chunk.offsets), tuple(chunk.sizes)


def collect(tensor: DTensor, places: Sequence[Place], owner: int, index: Index = ()) -> Tensor | None:
    """Put a sharded tensor, or a part of it, together on one process, to which the others send what it lacks.

    Args:
        tensor: sharded, in whatever way; all processes of the default group call this.
        places: what each process holds, by rank; where several hold the same, one sends it.
        owner: the rank that gets the whole.
        index: the part that is wanted; by default all of it.

    Returns:
        ``tensor[index]`` on the owner, where its mesh computes; ``None`` elsewhere.
    """
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        # Offloaded parts lie in the memory of the CPU, which not every backend can send from.
        shard = tensor.to_local().detach().to(tensor.device_mesh.device_type)
        shape = tuple(torch.empty(tensor.shape, device="meta")[index].shape)
        result = torch.empty(shape, dtype=shard.dtype, device=shard.device) if rank == owner else None
        present: set[Place] = set()
        for sender in (owner, *(other for other in range(len(places)) if other != owner)):
            place = places[sender]
            common = overlap(index, tuple(tensor.shape), *place)
            if place in present or common is None:
                continue
            present.add(place)
            of_shard, of_result = common
            if result is not None:
                piece = result[of_result]
                received = shard[of_shard] if sender == owner else torch.empty_like(piece)
                if sender != owner:
                    received = received.contiguous()
                    torch.distributed.recv(received, src=sender)
                piece.copy_(received)
            elif rank == sender:
                torch.distributed.send(shard[of_shard].contiguous(), dst=owner)
    return result


def reshard(module: nn.Module) -> None:
    """Free what a forward pass gathered: without a backward pass FSDP2 leaves the root's parameters whole."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


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
