"""What a Lightning strategy needs after a freeze, so that the callbacks never ask which strategy runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import lightning.pytorch as pl
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.optim import Optimizer


class StrategyAdapter(Protocol):
    """The contract between a callback and a strategy."""

    def drop_from_optimizers(self, trainer: pl.Trainer, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
        """Take parameters out of every optimizer and return a function that puts them back."""


class SingleDeviceAdapter:
    """One process, one device: the parameters are plain tensors and nothing wraps the module."""

    def drop_from_optimizers(self, trainer: pl.Trainer, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
        """Take parameters out of every optimizer's groups, and their state with them.

        A group that ends up empty stays, since learning-rate schedulers and a checkpoint count groups.
        """
        dropped = {id(parameter) for parameter in parameters}
        before = [(optimizer, _Groups(optimizer)) for optimizer in trainer.optimizers]
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                kept = [index for index, p in enumerate(group["params"]) if id(p) not in dropped]
                for key in _ALIGNED.intersection(group):
                    group[key] = [group[key][index] for index in kept]
            for parameter in [p for p in optimizer.state if id(p) in dropped]:
                del optimizer.state[parameter]

        def undo() -> None:
            for optimizer, groups in before:
                groups.restore(optimizer)

        return undo


# The names are there if the optimizer was given named parameters.
_ALIGNED = frozenset({"params", "param_names"})


class _Groups:
    """The parameters of an optimizer's groups and their state, as they were."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.aligned = [
            {key: list(group[key]) for key in _ALIGNED.intersection(group)} for group in optimizer.param_groups
        ]
        self.state = dict(optimizer.state)

    def restore(self, optimizer: Optimizer) -> None:
        kept = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # Groups that another callback added since keep what they have.
        added = {id(p) for group in optimizer.param_groups[len(self.aligned) :] for p in group["params"]}
        for group, aligned in zip(optimizer.param_groups, self.aligned, strict=False):
            back = [index for index, p in enumerate(aligned["params"]) if id(p) not in added]
            group.update({key: [values[index] for index in back] for key, values in aligned.items()})
        optimizer.state.update({p: state for p, state in self.state.items() if id(p) not in kept})


ADAPTERS: dict[type[Strategy], StrategyAdapter] = {SingleDeviceStrategy: SingleDeviceAdapter()}
"""The adapter of each supported strategy; a subclass of a strategy uses the adapter of its nearest base."""


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter:
    """The adapter of a Trainer's strategy.

    Raises:
        ValueError: if the strategy is not supported.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind in ADAPTERS:
            return ADAPTERS[kind]
    raise ValueError(
        f"{type(trainer.strategy).__name__} is not supported by KappaFreezeCallback: use one of "
        f"{', '.join(kind.__name__ for kind in ADAPTERS)}, that is Trainer(devices=1)"
    )
