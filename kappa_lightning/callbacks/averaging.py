"""Averages of weights beside a freeze: they are of what trains, and what is frozen keeps every bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from kappa_lightning.callbacks.trainer import callbacks_of
from kappa_lightning.parts import PartialTraining
from kappa_lightning.weights import plain_parameters
from kappa_lightning.weights.part import Index

AVERAGING = (WeightAveraging, StochasticWeightAveraging)
"""Callbacks that keep a copy of the module, with averages of its weights."""


@dataclass(frozen=True, slots=True, eq=False)
class _Frozen:
    """What one freeze keeps as it is."""

    module: nn.Module
    names: Collection[str]
    partial: PartialTraining | None

    def keep_in(self, average: nn.Module) -> None:
        """Give the frozen entries of an average the module's bits, from which a product with the decay rounds off."""
        indices: Mapping[str, list[Index]] = {} if self.partial is None else self.partial.indices
        averages = plain_parameters(average)
        with torch.no_grad():
            for name, parameter in plain_parameters(self.module).items():
                if name not in self.names or parameter.requires_grad:
                    continue
                trained: list[tuple[Index, Tensor]] = [
                    (index, averages[name][index].clone()) for index in indices.get(name, ())
                ]
                averages[name].copy_(parameter)
                for index, value in trained:
                    averages[name][index] = value


class _Guard:
    """What an averaging callback does otherwise as long as a freeze lasts."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.freezes: list[_Frozen] = []
        # Lightning pairs the parameters of the module and of its average one by one: parts must not come between.
        for name in dir(Callback):
            if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name):
                callback.__dict__[name] = self._without_parts(getattr(callback, name))
        model: Any = callback._average_model  # type: ignore[attr-defined]
        self._updating: Any = callback if isinstance(callback, StochasticWeightAveraging) else model
        self._updating.__dict__["update_parameters"] = self._updated(self._updating.update_parameters)

    def _without_parts(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def call(*arguments: Any, **named: Any) -> Any:
            with ExitStack() as hidden:
                for freeze in self.freezes:
                    if freeze.partial is not None:
                        hidden.enter_context(freeze.partial.hidden())
                return hook(*arguments, **named)

        return call

    def _updated(self, update: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(update)
        def call(*arguments: Any, **named: Any) -> Any:
            update(*arguments, **named)
            for freeze in self.freezes:
                freeze.keep_in(_average_of(self.callback))

        return call

    def leave(self) -> None:
        """Let the callback do what its class does."""
        for name in dir(Callback):
            self.callback.__dict__.pop(name, None)
        del self._updating.__dict__["update_parameters"]


_GUARDS: WeakKeyDictionary[Callback, _Guard] = WeakKeyDictionary()


def average_what_trains(
    trainer: pl.Trainer, module: nn.Module, frozen: Collection[str], partial: PartialTraining | None
) -> Callable[[], None]:
    """Let the averaging callbacks of a Trainer leave what is frozen as it is, and not see parts beside their wholes.

    Args:
        trainer: has the callbacks, which are set up.
        module: what it trains.
        frozen: the names of the parameters that are frozen, wholly or but for parts.
        partial: the parts that train.

    Returns:
        A function that takes it back.
    """
    callbacks = [callback for callback in callbacks_of(trainer, Callback) if isinstance(callback, AVERAGING)]
    freeze = _Frozen(module, frozenset(frozen), partial)
    for callback in callbacks:
        if callback not in _GUARDS:
            _GUARDS[callback] = _Guard(callback)
        _GUARDS[callback].freezes.append(freeze)

    def undo() -> None:
        for callback in callbacks:
            guard = _GUARDS.get(callback)
            if guard is not None and freeze in guard.freezes:
                guard.freezes.remove(freeze)
                if not guard.freezes:
                    _GUARDS.pop(callback).leave()

    return undo


def _average_of(callback: Callback) -> Any:
    """The averaged copy of the module; ``WeightAveraging`` has it in an ``AveragedModel``."""
    average: Any = callback._average_model  # type: ignore[attr-defined]
    return average if isinstance(callback, StochasticWeightAveraging) else average.module
