"""What each item of an evaluation adds to a metric, so that the uncertainty of the whole can be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_sum

from kappa_lightning.evaluation.batches import Share
from kappa_lightning.probes import Probe, content_key
from kappa_lightning.processes import Processes

MOST_ITEMS = 4096
"""Beyond, neighbors count as one: blocks of them are resampled, and memory stays within some megabytes."""

_MOST_IN_A_BATCH = 512


@dataclass(frozen=True)
class Items:
    """The states of a metric, item by item, in an order that does not depend on that of the batches.

    Attributes:
        keys: for each item the content of its batch, and its place there.
        states: for each state of the metric a tensor of shape (items, ...): what an item adds to a sum, or its entry in
            a list.
    """

    keys: list[str]
    states: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.keys)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and texts, for a checkpoint."""
        return {"keys": list(self.keys), "states": dict(self.states)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Items:
        """What :meth:`state_dict` returned."""
        return cls(list(state["keys"]), dict(state["states"]))


class ItemRecorder:
    """Collects what each item adds to a probe's metric.

    An item is a sample of a batch if what the step returns can be split along its first dimension, and the metric of
    the parts adds up to that of the whole; otherwise it is a batch. A metric whose states are neither sums nor lists
    has no items.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.metric = probe.metric
        self.sums = _sums(self.metric)
        self.lists = _lists(self.metric)
        nested = sum(isinstance(part, Metric) for part in self.metric.modules()) > 1
        self.works = not nested and len(self.sums) + len(self.lists) == len(self.metric._defaults) > 0
        self.keys: list[tuple[str, int]] = []
        self.rows: list[dict[str, Tensor]] = []
        self._scratch = deepcopy(self.metric) if self.works else None
        self._before: dict[str, Any] = {}

    def begin_batch(self) -> None:
        """Called before the metric gets a batch."""
        self._before = {name: getattr(self.metric, name).detach().clone() for name in self.sums}
        self._before |= {name: len(getattr(self.metric, name)) for name in self.lists}

    def end_batch(self, batch_key: str, result: Any, batch: Any) -> None:
        """Called with what the step returned, after the metric got it."""
        if not self.works:
            return
        whole = self._added()
        rows = self._rows(result, batch, whole)
        if rows is None:
            if self.lists:
                self.works = False  # an entry for several samples is no item
                return
            rows = {name: value.unsqueeze(0) for name, value in whole.items()}
        count = len(next(iter(rows.values())))
        self.keys += [(batch_key, place) for place in range(count)]
        # What is summed is summed exactly; an entry of a list may be a class or a flag.
        self.rows.append(
            {n: v.detach().cpu() if n in self.lists else v.detach().cpu().double() for n, v in rows.items()}
        )

    def items(self, processes: Processes, share: Share, split: bool) -> Items | None:
        """All items, of all processes if they have read different batches; a collective call."""
        mine = (share.index, self.keys, _cat(self.rows)) if self.works and self.rows else (share.index, [], None)
        parts = processes.gather(mine) if split and processes.world_size > 1 else [mine]
        of_shares = {index: (keys, states) for index, keys, states in parts}
        found = [(keys, states) for _, (keys, states) in sorted(of_shares.items())]
        if any(states is None for _, states in found):
            return None
        return _ordered([key for keys, _ in found for key in keys], _cat([s for _, s in found if s is not None]))

    def _added(self) -> dict[str, Tensor]:
        added = {}
        for name in self.sums:
            now = getattr(self.metric, name).detach()
            added[name] = now.double().cpu() - self._before[name].double().cpu()
        for name in self.lists:
            entries = getattr(self.metric, name)[self._before[name] :]
            added[name] = (
                torch.cat([e.unsqueeze(0) if e.ndim == 0 else e for e in entries]) if entries else torch.zeros(0)
            )
        return added

    def _rows(self, result: Any, batch: Any, whole: dict[str, Tensor]) -> dict[str, Tensor] | None:
        parts = self.probe.split(result, batch)
        if parts is None or len(parts) < 1:
            return None
        if self.lists and not self.sums:
            rows = whole if all(len(value) == len(parts) for value in whole.values()) else None
            return rows
        if self.lists:
            return None
        if type(self.metric).update is MeanMetric.update and all(isinstance(part, Tensor) for part in parts):
            values = torch.stack([part.detach().double().sum() for part in parts])
            weights = torch.tensor([float(part.numel()) for part in parts], dtype=torch.float64)
            rows = {"mean_value": values, "weight": weights}
        else:
            rows = _cat([self._states_of(part) for part in _at_most(parts, _MOST_IN_A_BATCH)])
        fits = all(
            torch.allclose(rows[name].sum(0).double().cpu(), value.cpu(), rtol=1e-4, atol=1e-6)
            for name, value in whole.items()
        )
        return rows if fits else None

    def _states_of(self, parts: list[Any]) -> dict[str, Tensor]:
        scratch = self._scratch
        assert scratch is not None
        scratch.to(self.metric.device)
        scratch.reset()
        for part in parts:
            self.probe.give(scratch, part)
        states = {name: getattr(scratch, name).detach().clone().unsqueeze(0) for name in self.sums}
        scratch.reset()
        return states


def _sums(metric: Metric) -> list[str]:
    return [
        name
        for name, reduction in metric._reductions.items()
        if reduction is dim_zero_sum and isinstance(metric._defaults[name], Tensor)
    ]


def _lists(metric: Metric) -> list[str]:
    return [
        name
        for name, reduction in metric._reductions.items()
        if reduction is dim_zero_cat and isinstance(metric._defaults[name], list)
    ]


def _at_most(parts: list[Any], count: int) -> list[list[Any]]:
    bounds = np.linspace(0, len(parts), min(count, len(parts)) + 1).astype(int)
    return [parts[start:end] for start, end in pairwise(bounds)]


def _cat(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _ordered(keys: list[tuple[str, int]], states: dict[str, Tensor]) -> Items:
    order = sorted(range(len(keys)), key=lambda place: keys[place])
    seen: Counter[tuple[str, int]] = Counter()
    names = []
    for place in order:
        key = keys[place]
        names.append(f"{key[0]}.{key[1]}.{seen[key]}")
        seen[key] += 1
    return Items(names, {name: value[order] for name, value in states.items()})


def key_of(batch: Any) -> str:
    """The content of a batch, by which an item is found again in a later evaluation."""
    return content_key(batch)
