"""Which adapter serves which strategy."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.strategies.xla import XLAStrategy

from kappa_lightning.strategies.adapter import StrategyAdapter
from kappa_lightning.strategies.ddp import DDPAdapter
from kappa_lightning.strategies.model_parallel import ModelParallelAdapter

_ADAPTERS: dict[type[Strategy], StrategyAdapter] = {
    SingleDeviceStrategy: StrategyAdapter(),
    DDPStrategy: DDPAdapter(),
    ModelParallelStrategy: ModelParallelAdapter(),
}
# Refused by name, since some derive from a strategy that is supported.
_INSTEAD: dict[type[Strategy], str] = {
    FSDPStrategy: "use ModelParallelStrategy, which shards with FSDP2",
    DeepSpeedStrategy: 'use strategy="ddp", or ModelParallelStrategy if the model does not fit on one device',
    XLAStrategy: "use a GPU or a CPU",
    SingleDeviceXLAStrategy: "use a GPU or a CPU",
}


def register_adapter(strategy: type[Strategy], adapter: StrategyAdapter) -> None:
    """Make an adapter known for a strategy, and for those derived from it that have none of their own.

    Raises:
        TypeError: if the arguments are not a class of strategies and an adapter.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> class MyStrategy(DDPStrategy):
        ...     pass
        >>> class MyAdapter(DDPAdapter):
        ...     def settle(self, module):
        ...         print("after a forward pass")
        >>> register_adapter(MyStrategy, MyAdapter())
    """
    if not (isinstance(strategy, type) and issubclass(strategy, Strategy)):
        raise TypeError(f"strategy={strategy!r} is no class of strategies: give one, such as DDPStrategy")
    if not isinstance(adapter, StrategyAdapter):
        raise TypeError(f"adapter={adapter!r} is no StrategyAdapter: derive one from it, and give an instance")
    _ADAPTERS[strategy] = adapter


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter:
    """The adapter of a Trainer's strategy: that of the nearest class that it derives from.

    Raises:
        ValueError: if the strategy is not supported; the message says what to use instead.
    """
    name = type(trainer.strategy).__name__
    for kind in type(trainer.strategy).__mro__:
        if kind in _ADAPTERS:
            return _ADAPTERS[kind]
        if kind in _INSTEAD:
            raise ValueError(
                f"kappa_lightning does not support {name}, with which it has not been tried: {_INSTEAD[kind]}"
            )
    if any(kind.__module__.startswith("pytorch_lightning.") for kind in type(trainer.strategy).__mro__):
        raise ValueError(
            "this Trainer is that of pytorch_lightning, and the callbacks of kappa_lightning are for its twin package, "
            "lightning: write `import lightning.pytorch as pl` (and take module, data and callbacks from there), which "
            "is the same code under another name"
        )
    raise ValueError(
        f"kappa_lightning has no adapter for {name}: use {', '.join(kind.__name__ for kind in _ADAPTERS)}, or register "
        "one with kappa_lightning.strategies.register_adapter"
    )
