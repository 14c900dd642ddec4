"""One freeze of a module: how it is done, all or nothing, and how it is taken back."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kappa_lightning.callbacks.averaging import average_what_trains
from kappa_lightning.callbacks.plan import AnyProfile, Plan
from kappa_lightning.parts import PartialTraining, train_parts
from kappa_lightning.strategies import StrategyAdapter, add_beside, scale_rates
from kappa_lightning.weights import plain_parameters
from kappa_lightning.weights.names import plain_name

# A layer keeps here which freeze froze which of its parameters, so that a freeze of ours is never taken for the user's:
# in the layer, since a new LightningModule around the same network shares it and a copy has it, too; as plain text, so
# that a pickle of it needs nothing of ours. Not with the parameters: FSDP2 swaps them.
_MARK = "_frozen_by_kappa_lightning"
_OWNERS: MutableMapping[str, Callback] = weakref.WeakValueDictionary()

Place = tuple[nn.Module, str]
"""The layer that has a parameter, and its name there."""


def _places(module: nn.Module) -> dict[str, Place]:
    """The place of every parameter, by its plain name; a tied one's first."""
    layers = dict(module.named_modules(remove_duplicate=False))
    found = {}
    for stored, _ in module.named_parameters():
        owner, _, attribute = stored.rpartition(".")
        found[plain_name(stored)] = (layers[owner], attribute)
    return found


def _frozen_by(place: Place) -> str | None:
    """What :class:`Freeze` marked a parameter with, if it has frozen it."""
    layer, attribute = place
    mark: str | None = layer.__dict__.get(_MARK, {}).get(attribute)
    return mark


def frozen_earlier(module: nn.Module, names: Iterable[str], running: Iterable[Callback]) -> list[nn.Parameter]:
    """The parameters that a freeze callback froze in an earlier fit.

    Args:
        module: has the parameters.
        names: of the parameters that are looked at.
        running: callbacks whose freeze is of the fit that is beginning.
    """
    parameters, places, current = plain_parameters(module), _places(module), {id(callback) for callback in running}
    marks = [(parameters[name], _frozen_by(places[name])) for name in names]
    return [p for p, mark in marks if mark is not None and not p.requires_grad and id(_OWNERS.get(mark)) not in current]


@contextmanager
def thawed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let parameters require a gradient, and no longer if what follows fails."""
    for parameter in parameters:
        parameter.requires_grad = True
    try:
        yield
    except BaseException:
        for parameter in parameters:
            parameter.requires_grad = False
        raise


class Freeze:
    """A plan that has been carried out.

    Args:
        trainer: whose strategy and optimizers are concerned.
        module: what it trains.
        adapter: of the strategy.
        plan: what becomes of the parameters.
        owner: the callback whose freeze it is.

    Raises:
        ValueError: if an optimizer cannot do it. Nothing has been changed then, as after any other error.
    """

    def __init__(
        self, trainer: pl.Trainer, module: nn.Module, adapter: StrategyAdapter, plan: Plan[AnyProfile], owner: Callback
    ) -> None:
        parameters = plain_parameters(module)
        self._mark = uuid.uuid4().hex
        _OWNERS[self._mark] = owner
        self._trainer: weakref.ref[pl.Trainer] | None = weakref.ref(trainer)
        self._adapter = adapter
        self._undo_optimizers: Callable[[], None] = _nothing
        self._undo_rates: Callable[[], None] = _nothing
        self._undo_parts: Callable[[], None] = _nothing
        self._undo_averages: Callable[[], None] = _nothing
        self._partial: PartialTraining | None = None
        self._storing: list[RemovableHandle] = []
        self._divided = [parameters[part.parameter] for part in plan.parts]
        self._thawed = [parameters[name] for name in plan.thawed if not parameters[name].requires_grad]
        frozen = [parameters[name] for name in parameters if name in plan.frozen and name not in plan.thawed]
        places = _places(module)
        self._frozen = [
            (places[name], parameters[name])
            for name in parameters
            if name in plan.frozen and name not in plan.thawed and parameters[name].requires_grad
        ]
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = [(p, p.grad) for p in frozen]
        dropped = [parameters[name] for name in parameters if name in plan.dropped]
        adapter.require_steps(trainer, dropped)
        try:
            if plan.parts:
                self._partial = train_parts(module, plan.parts)
                trained = self._partial.parameters
                beside = [(parameters[part.parameter], part.name, trained[part.name]) for part in plan.parts]
                self._undo_parts = add_beside(trainer.optimizers, beside)
                self._storing = [optimizer.register_step_post_hook(self._store) for optimizer in trainer.optimizers]
            self._undo_optimizers = adapter.drop_from_optimizers(trainer, dropped)
            if plan.rates is not None:
                factors = {parameters[name]: rate for name, rate in plan.rates.items() if name in plan.trained}
                self._undo_rates = scale_rates(trainer.optimizers, factors)
            for (layer, attribute), _ in self._frozen:
                layer.__dict__.setdefault(_MARK, {})[attribute] = self._mark
            for parameter in frozen:
                # Not requires_grad_(), which a lazy layer's parameter refuses.
                parameter.requires_grad = False
                parameter.grad = None
            for parameter in self._thawed:
                parameter.requires_grad = True
            self._undo_averages = average_what_trains(trainer, module, plan.frozen, self._partial)
            self.rewrap()
        except BaseException:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            self.undo()
            for parameter in self._thawed:
                parameter.requires_grad = False
            raise
        self._gradients = []

    def thaw(self) -> None:
        """Give ``requires_grad`` back, to what no other callback has frozen since; parts are one with their wholes."""
        self._rejoin()
        for (layer, attribute), parameter in self._frozen:
            if _frozen_by((layer, attribute)) == self._mark:
                parameter.requires_grad = True
                del layer.__dict__[_MARK][attribute]
                if not layer.__dict__[_MARK]:
                    del layer.__dict__[_MARK]
        self._frozen = []

    def undo(self) -> None:
        """Give ``requires_grad``, the places in the optimizers and their rates back."""
        self.thaw()
        self._undo_rates()
        self._undo_optimizers()
        self._undo_parts()

    def rewrap(self) -> None:
        """Let what wraps the module know, while there is such."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            self._adapter.requires_grad_changed(trainer)

    def fit_ended(self) -> None:
        """What wrapped the module is gone; parameters of which parts trained are whole again, and frozen."""
        self._trainer = None
        self._rejoin()

    def _store(self, *_: Any) -> None:
        """After an optimizer's step, which all processes take together."""
        if self._partial is not None:
            self._partial.store()

    def _rejoin(self) -> None:
        self._undo_averages()
        if self._partial is not None:
            for handle in self._storing:
                handle.remove()
            self._partial.undo()
            self._partial = None
            for parameter in self._divided:
                parameter.requires_grad = False


def _nothing() -> None:
    """What there is to undo before anything is done."""
