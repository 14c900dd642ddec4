"""Is a capability lost, or only out of line? A few steps on a copy of what trains bring back what was never lost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler

from kappa_lightning.evaluation.evaluate import Circumstances, Measurement, measure_probe
from kappa_lightning.parts import divided, store_parts
from kappa_lightning.probes import Probe, known_length
from kappa_lightning.weights.sharded import is_sharded, reshard


def require_recoverable(name: str, probe: Probe, steps: int) -> None:
    """Make sure that a probe can be learned from, and has examples left to be measured on.

    Raises:
        ValueError: if it has no loss, no batch beside the first ``steps``, or another order each time.
    """
    if not probe.has_loss:
        raise ValueError(
            f"recoverable={steps} takes optimizer steps on the probe {name!r}, and {type(probe).__name__} has no loss: "
            "give it loss=… (a function of module and batch that returns a scalar tensor; Probe takes one), or measure "
            "this probe in a ForgettingEval without recoverable"
        )
    length = known_length(probe.dataloader)
    if length is not None and length <= steps:
        raise ValueError(
            f"recoverable={steps} takes a step on each of the first {steps} batches of the probe {name!r} and measures "
            f"the others, and it has {length}: give more or smaller batches, or fewer steps"
        )
    if isinstance(getattr(probe.dataloader, "sampler", None), RandomSampler):
        raise ValueError(
            f"recoverable={steps} needs the batches of the probe {name!r} in the same order each time, so that those "
            "learned from are not those measured, and its dataloader shuffles: give one with shuffle=False"
        )


Moving = tuple[nn.Parameter, nn.Parameter]
"""A parameter, and what moves in its place."""


@dataclass(frozen=True)
class SameOptimizers:
    """Makes optimizers of the kinds and with the settings of others, in a fresh state, at their initial rates."""

    optimizers: Sequence[Optimizer]

    def __call__(self, moving: Sequence[Moving]) -> list[Optimizer]:
        """One for each that has any of the parameters, for what moves in their place, all in a single group."""
        made = []
        for optimizer in self.optimizers:
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            places = [place for parameter, place in moving if id(parameter) in own]
            if not places:
                continue
            kind = type(optimizer)
            taken = inspect.signature(kind).parameters
            settings = {key: value for key, value in optimizer.defaults.items() if key in taken}
            # A scheduler notes the rate that it started from; by now it may have taken the rate to zero.
            rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
            made.append(kind(places, **settings | {"lr": max(rates)}))
        if not made:
            raise ValueError("recoverable takes steps like the optimizers, and none of them has anything that trains")
        return made


def measure_rest(
    module: nn.Module,
    probe: Probe,
    circumstances: Circumstances,
    steps: int,
    make_optimizers: Callable[[Sequence[Moving]], Sequence[Optimizer]] | None,
    name: str,
    within: Callable[[], Any],
) -> Measurement:
    """A probe on all batches but the first ``steps``, with a step on each of these beforehand if there is an optimizer.

    The steps are taken in eval mode, so without dropout, on copies of the parameters that train or, where processes
    share these out or they are parts of others, on the parameters themselves, which are put back bit for bit: the
    module has its own parameters, gradients, buffers and random numbers afterwards, and its optimizers are never
    touched. Every process takes the same steps.

    Args:
        module: what is measured.
        probe: how; its :meth:`~kappa_lightning.Probe.loss_of` is what the steps go down.
        circumstances: what a Trainer adds.
        steps: how many.
        make_optimizers: makes optimizers of what moves; without it no step is taken.
        name: the probe's, for errors.
        within: makes a context around all batches.

    Raises:
        ValueError: if there are too few batches, or the loss reaches nothing that trains.
    """

    @contextmanager
    def aligned() -> Iterator[None]:
        with within():
            if make_optimizers is None:
                yield
                return
            with move(module) as moving:
                _learn(module, probe, circumstances, steps, make_optimizers(moving), name)
                circumstances.settle()
                yield

    parts = divided(module)
    themselves = bool(parts) or any(is_sharded(parameter) for parameter in module.parameters())
    move = themselves_train if themselves else copies_train
    moved = [*_training(module), *parts] if themselves and make_optimizers is not None else ()
    return measure_probe(module, probe, circumstances, name, aligned, _Rest(probe.dataloader, steps), moved)


@contextmanager
def copies_train(module: nn.Module) -> Iterator[list[Moving]]:
    """Let copies take the place of the parameters that train; yields each parameter with its copy.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with copies_train(layer) as moving:
        ...     _ = [nn.init.zeros_(copy) for _, copy in moving]
        ...     layer(torch.ones(2)).tolist()
        [0.0, 0.0]
        >>> bool((layer.weight == 0).any())
        False
    """
    places = [
        (submodule, name, parameter)
        for submodule in module.modules()
        for name, parameter in submodule._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    # What is tied stays tied.
    copies = {id(parameter): nn.Parameter(parameter.detach().clone()) for _, _, parameter in places}
    try:
        for submodule, name, parameter in places:
            # Not in _parameters, as recurrent layers keep a list of their weights beside it.
            setattr(submodule, name, copies[id(parameter)])
        yield list({id(parameter): (parameter, copies[id(parameter)]) for _, _, parameter in places}.values())
    finally:
        for submodule, name, parameter in places:
            setattr(submodule, name, parameter)


@contextmanager
def themselves_train(module: nn.Module) -> Iterator[list[Moving]]:
    """Let the parameters that train move, and put them back bit for bit, with their gradients.

    FSDP2 gathers the parameters that it was given, and no others in their place, and a part lies in its whole's memory.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight.detach().clone()
        >>> with themselves_train(layer) as moving:
        ...     _ = [nn.init.zeros_(parameter) for parameter, _ in moving]
        >>> torch.equal(layer.weight, before)
        True
    """
    reshard(module)
    parameters = _training(module)
    kept = [(_own_part(parameter).clone(), parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None  # FSDP2 would add to one that is there
    try:
        yield [(parameter, parameter) for parameter in parameters]
    finally:
        reshard(module)
        for parameter, (content, gradient) in zip(parameters, kept, strict=True):
            _own_part(parameter).copy_(content)
            parameter.grad = gradient
        store_parts(module)


def _training(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _own_part(parameter: nn.Parameter) -> Tensor:
    """The memory of a parameter, or of the part of it that this process holds."""
    return (parameter.to_local() if is_sharded(parameter) else parameter).detach()


def _learn(
    module: nn.Module,
    probe: Probe,
    circumstances: Circumstances,
    steps: int,
    optimizers: Sequence[Optimizer],
    name: str,
) -> None:
    device = circumstances.device or next(module.parameters()).device
    taken = 0
    for batch in islice(iter(probe.dataloader), steps):
        batch = move_data_to_device(probe.prepare(batch, circumstances.convert), device)

        def closure(batch: Any = batch) -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            with circumstances.precision():
                loss = probe.loss_of(module, batch)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise ValueError(
                    f"the loss of the probe {name!r} is no scalar tensor with a gradient to what trains: recoverable "
                    "needs one (a loss that detaches nothing, and layers that compute with what trains in eval mode)"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            for optimizer in optimizers:
                optimizer.step(closure)  # type: ignore[arg-type]
        store_parts(module)
        taken += 1
    if taken < steps:
        raise ValueError(f"recoverable={steps} needs more batches than that, and the probe {name!r} gave {taken}")


class _Rest(Iterable[Any]):
    """All batches but the first ones."""

    def __init__(self, dataloader: Iterable[Any], first: int) -> None:
        self.dataloader, self.first = dataloader, first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.dataloader), self.first, None)

    def __len__(self) -> int:
        length = known_length(self.dataloader)
        if length is None:
            raise TypeError("the number of batches is not known")
        return max(length - self.first, 0)
