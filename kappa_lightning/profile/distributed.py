"""One profile by many processes: each decomposes a share of the weights, and all end with every row."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from kappa_lightning.processes import Processes
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.weights import Weight
from kappa_lightning.weights.sharded import Place, collect, is_sharded, place_of

Kept = TypeVar("Kept")

Compute = Callable[[Sequence[Weight]], Generator[KappaRow, None, None]]
Watch = Callable[[Sequence[Weight], Iterator[KappaRow]], Iterable[KappaRow]]


def compute_distributed(
    weights: Sequence[Weight], compute: Compute, processes: Processes, watch: Watch | None = None
) -> Iterator[KappaRow]:
    """The rows of all weights, on every process, of which each has decomposed a share.

    A row is computed once and then sent around, so that all processes hold the same bits whatever their arithmetic.
    Sharded weights are put together one for each process at a time, on that rank.

    Args:
        weights: the same on every process.
        compute: decomposes weights, without waiting for another process.
        processes: who takes part; one alone just computes.
        watch: sees the weights of a share and its rows as they come, to show progress.

    Raises:
        RuntimeError: if the weights are not the same on every process; on those that did not fail, if one did.
    """
    watch = watch or (lambda _, rows: rows)
    if processes.world_size == 1:
        # Whatever ends the watching ends the work at once, and not when somebody lets go of the last reference to it.
        with closing(compute(weights)) as rows:
            yield from watch(weights, rows)
        return
    _require_same(weights, processes)
    present = partition([weight for weight in weights if not weight.is_sharded], processes.world_size)[processes.rank]
    with processes.failing_together():
        own = []
        if present:
            with closing(compute(present)) as rows:
                own = list(watch(present, rows))
    turns = _turns([weight for weight in weights if weight.is_sharded], processes.world_size)
    if turns:
        share = [weights[processes.rank] for weights in turns if processes.rank < len(weights)]
        own += watch(share, _compute_sharded(turns, compute, processes))
    for share_of_rows in processes.gather(own):
        yield from share_of_rows


def _require_same(weights: Sequence[Weight], processes: Processes) -> None:
    mine = [(weight.name, weight.shape, weight.is_sharded) for weight in weights]
    for rank, other in enumerate(processes.gather(mine)):
        if other != mine:
            name = min(set(other) ^ set(mine))[0]
            raise RuntimeError(
                f"the processes of rank {processes.rank} and {rank} do not profile the same tensors, {name} first: the "
                "module must be the same on both, with the same requires_grad"
            )


def partition(weights: Sequence[Weight], world_size: int) -> list[list[Weight]]:
    """Weights in shares of nearly equal cost, the expensive ones first, each to whoever has least.

    Graham's longest-processing-time rule ("Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17, 1969,
    eq. 5): the largest share costs at most 4/3 of the least that is possible.

    Example:
        >>> from torch import nn
        >>> from kappa_lightning.weights import find_weights
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 9), nn.Linear(7, 7), nn.Linear(6, 6))
        >>> [[weight.name for weight in share] for share in partition(find_weights(net), 2)]
        [['1.weight'], ['2.weight', '3.weight', '0.weight']]
    """
    shares: list[list[Weight]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for weight in _expensive_first(weights):
        lightest = min(range(world_size), key=loads.__getitem__)
        shares[lightest].append(weight)
        loads[lightest] += weight.cost
    return shares


def _turns(weights: Sequence[Weight], world_size: int) -> list[list[Weight]]:
    """Weights in turns of one for each rank, of similar cost within a turn."""
    ordered = _expensive_first(weights)
    return [ordered[start : start + world_size] for start in range(0, len(ordered), world_size)]


def _expensive_first(weights: Sequence[Weight]) -> list[Weight]:
    return sorted(weights, key=lambda weight: (-weight.cost, weight.name))


def _compute_sharded(turns: Sequence[Sequence[Weight]], compute: Compute, processes: Processes) -> Iterator[KappaRow]:
    """The rows of this process' weight in each turn, which the others send their parts of."""
    places = processes.gather({weight.name: _place(weight) for weights in turns for weight in weights})
    for weights in turns:
        mine: list[Weight] = []
        for owner, weight in enumerate(weights):
            tensor = _collect(weight, [place[weight.name] for place in places], owner)
            # What it is computed from may be sharded, too.
            sources = None if weight.sources is None else weight.sources()
            if tensor is not None and owner == processes.rank:
                kept = None if sources is None else partial(_same, sources)
                mine = [replace(weight, read=partial(_same, tensor), sources=kept)]
            del tensor, sources
        with processes.failing_together():
            rows = list(compute(mine))
        del mine
        yield from rows


def _place(weight: Weight) -> Place | None:
    """Where this process' part of a weight lies; ``None`` of one that is computed from others."""
    parameter = weight.parameter
    return place_of(parameter) if parameter is not None and is_sharded(parameter) and not weight.is_made else None


def _collect(weight: Weight, places: Sequence[Place | None], owner: int) -> Tensor | None:
    known = [place for place in places if place is not None]
    parameter = weight.parameter
    if parameter is None or not is_sharded(parameter) or len(known) < len(places):
        return weight.read()
    return collect(parameter, known, owner, () if weight.part is None else weight.part.index)


def _same(kept: Kept) -> Kept:
    return kept
