"""Parts of a parameter that FSDP2 shards: each is sharded by itself, and so are its gradient and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed
from torch import Tensor, nn

from kappa_lightning.weights.part import Index, overlap
from kappa_lightning.weights.sharded import place_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the parameters of a module before its forward pass."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def has_one_shard(whole: DTensor) -> bool:
    """Whether a parameter is cut in one dimension of its mesh, and else copied: FSDP, without tensor parallelism."""
    shards = [placement for placement in whole.placements if not placement.is_replicate()]
    return len(shards) == 1 and shards[0].is_shard()


class ShardedParts:
    """The parts of one parameter that FSDP2 shards.

    A part cannot lie in the memory of the whole: an expert of a tensor that is cut between experts is on one process,
    which would have all of its gradient and state while another has none. So each part is a ``DTensor`` of its own, cut
    along its first dimension over the processes that share the whole. :meth:`store` puts its values into the whole,
    from which FSDP2 gathers; that must be called after each step of the optimizer, by all processes together.

    Args:
        whole: the parameter, sharded by FSDP2.
        indices: for the name of each part where it lies.
    """

    def __init__(self, whole: DTensor, indices: Mapping[str, Index]) -> None:
        self.whole = whole
        self.indices = dict(indices)
        self._mesh = whole.device_mesh
        (self._dim,) = (at for at, placement in enumerate(whole.placements) if placement.is_shard())
        self._world_size = self._mesh.size(self._dim)
        self._rank = self._mesh.get_local_rank(self._dim)
        entries = torch.empty(whole.shape, device="meta")
        self._shapes = {name: tuple(entries[index].shape) for name, index in self.indices.items()}
        self.parts = {
            name: nn.Parameter(self._distributed(rows, self._shapes[name])) for name, rows in self._cut().items()
        }

    def moved(self, whole: DTensor, parts: dict[str, nn.Parameter]) -> None:
        """The whole and its parts are elsewhere now, or in another precision."""
        self.whole, self.parts = whole, parts

    def load(self) -> None:
        """Take the parts' values from the whole, by all processes together."""
        with torch.no_grad():
            for name, values in self._cut().items():
                _local(self.parts[name]).copy_(values)

    def store(self) -> None:
        """Put the parts' values into the whole, by all processes together."""
        with torch.no_grad():
            padded = [self._padded(_local(part), self._shapes[name]) for name, part in self.parts.items()]
            sent = torch.cat(padded).to(self._mesh.device_type)
            received = sent.new_empty((self._world_size, sent.numel()))
            torch.distributed.all_gather_into_tensor(received.flatten(), sent, group=self._group(self._dim))
            offsets, sizes = place_of(self.whole)
            here, start = self.whole.to_local(), 0
            for (name, index), chunk in zip(self.indices.items(), padded, strict=True):
                shape = self._shapes[name]
                values = received[:, start : start + chunk.numel()].reshape(-1, *shape[1:])[: shape[0]]
                start += chunk.numel()
                common = overlap(index, tuple(self.whole.shape), offsets, sizes)
                if common is not None:
                    of_shard, of_part = common
                    here[of_shard].copy_(values[of_part])

    def reduce(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Each process' share of the mean over processes of the parts' gradients.

        Args:
            gradients: of the parts in their order, whole and plain; ``None`` where none is needed, the same everywhere.

        Returns:
            A ``DTensor`` for each that is not ``None``, placed like the part.
        """
        given = {name: gradient for name, gradient in zip(self.parts, gradients, strict=True) if gradient is not None}
        if not given:
            return list(gradients)
        # In the precision of the part, which is at least that of what FSDP2 gathered.
        wide = [self._by_process(g.to(self.parts[name].dtype)) for name, g in given.items()]
        sent = torch.cat(wide, dim=1)
        mine = sent.new_empty(sent.shape[1])
        torch.distributed.reduce_scatter_tensor(mine, sent.flatten(), group=self._group(self._dim))
        for dim in range(self._mesh.ndim):
            if dim != self._dim:
                torch.distributed.all_reduce(mine, group=self._group(dim))
        mine /= self._mesh.size()
        reduced: dict[str, Tensor] = {}
        start = 0
        for (name, gradient), chunk in zip(given.items(), wide, strict=True):
            part = _local(self.parts[name])
            entries = mine[start : start + chunk.shape[1]].reshape(-1, *gradient.shape[1:])[: part.shape[0]]
            start += chunk.shape[1]
            reduced[name] = self._distributed(entries.clone().to(part.device), tuple(gradient.shape))
        return [reduced.get(name) for name in self.parts]

    def _group(self, dim: int) -> Any:
        return self._mesh.get_group(dim)

    def _cut(self) -> dict[str, Tensor]:
        """Of each part this process' rows, in memory of their own where the shard is."""
        with torch.no_grad():
            gathered = self.whole.full_tensor()
            device = self.whole.to_local().device
            return {name: self._rows(gathered[index]).to(device, copy=True) for name, index in self.indices.items()}

    def _rows(self, part: Tensor) -> Tensor:
        chunk = self._chunk(part.shape[0])
        return part[self._rank * chunk : (self._rank + 1) * chunk]

    def _chunk(self, rows: int) -> int:
        """The rows of the first process; the last ones may have fewer or none."""
        return -(-rows // self._world_size)

    def _padded(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        filled = rows.new_zeros((self._chunk(shape[0]), *shape[1:]))
        filled[: len(rows)] = rows
        return filled.flatten()

    def _by_process(self, gradient: Tensor) -> Tensor:
        """(process, entries) of what each is going to have, padded with zeros."""
        rows = self._chunk(gradient.shape[0]) * self._world_size
        filled = gradient.new_zeros((rows, *gradient.shape[1:]))
        filled[: gradient.shape[0]] = gradient
        return filled.reshape(self._world_size, -1)

    def _distributed(self, rows: Tensor, shape: tuple[int, ...]) -> DTensor:
        from torch.distributed.tensor import DTensor, Shard

        placements = [
            Shard(0) if dim == self._dim else placement for dim, placement in enumerate(self.whole.placements)
        ]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _local(tensor: Tensor) -> Tensor:
    return cast("DTensor", tensor).to_local()
