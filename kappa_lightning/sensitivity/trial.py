"""A trial: train everything for a few dozen steps, then take back each tensor's movement in turn and look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kappa_lightning.processes import Processes
from kappa_lightning.restoring import modes_restored
from kappa_lightning.sensitivity.gradients import clear, require_finite
from kappa_lightning.sensitivity.lending import lent
from kappa_lightning.sensitivity.signal import backward
from kappa_lightning.weights import Weight

KEPT = 128
"""Of a softmax the likeliest classes whose probabilities are kept; all others count as one."""

_LEAST = 1e-2
"""The share of the mean sensitivity below which one is not told from zero."""


class Trial:
    """What a trial measures with: functions of the batches, none of which leaves a graph behind.

    Args:
        step: ``step(number)`` returns the loss of a batch of the new task, with a graph.
        losses: the loss of each of the batches that margins are measured on, in eval mode.
        describe: what the model says of the reference now.
        divergence: the mean divergence of what it says from a description, in nats a row.
        settle: called when forward passes are over, before a weight is changed.
    """

    def __init__(
        self,
        step: Callable[[int], Tensor],
        losses: Callable[[], float],
        describe: Callable[[], Any],
        divergence: Callable[[Any], float],
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.step = step
        self.losses = losses
        self.describe = describe
        self.divergence = divergence
        self.settle = settle


def margins(
    module: nn.Module,
    weights: Sequence[Weight],
    trial: Trial,
    optimizers: Sequence[Optimizer],
    *,
    steps: int = 32,
    alongside: Sequence[nn.Parameter] = (),
    processes: Processes | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """What each tensor's movement has won for the task, and what it has changed, given that all others moved, too.

    All candidates train for some steps. Then each one's movement Δ is taken back, with the others where they are:
    its signal is by how much the task's loss rises, its sensitivity by how much the divergence from the pretrained
    model falls. Since the divergence of a movement is ½ΔᵀFΔ, that margin is Δ_Tᵀ(FΔ) − ½Δ_TᵀFΔ_T: it holds what the
    diagonal misses, the terms between this tensor's entries and between them and all others.

    Call it within :func:`~kappa_lightning.sensitivity.gradients.differentiating`. Weights and optimizers are put back
    bit for bit, also if it fails. It takes a copy of what trains, and what the optimizers keep of it.

    Args:
        module: the model.
        weights: the candidates.
        trial: what is measured.
        optimizers: those that will train; they lend their steps, at the rate that schedules begin from.
        steps: how many.
        alongside: parameters that train as well, without a figure, and are where they have come to in all margins.
        processes: who shares the tensors, each with the whole module.
        tick: called after every step and every tensor, for a progress bar.

    Returns:
        Signal (in units of the loss) and sensitivity (in nats a row) by name. A margin below zero is no signal, and no
        more sensitivity than a hundredth of the mean.

    Raises:
        ValueError: if the loss or the divergence is not finite: the rate is too high.
    """
    together = processes or Processes()
    parameters = list({id(p): p for weight in weights for p in weight.parameters}.values())
    with modes_restored(module):
        module.eval()
        with torch.no_grad():
            before = trial.describe()
        trial.settle()
    with lent(optimizers, [*parameters, *alongside]) as starts:
        for number in range(steps):
            clear(weights, alongside)
            backward(trial.step(number))
            for optimizer in optimizers:
                optimizer.step()
            tick(1)
        clear(weights, alongside)
        trial.settle()
        with modes_restored(module), torch.no_grad():
            module.eval()
            return _taken_back(weights, trial, before, starts, together, tick)


def _taken_back(
    weights: Sequence[Weight],
    trial: Trial,
    before: Any,
    starts: dict[int, Tensor],
    processes: Processes,
    tick: Callable[[int], None],
) -> tuple[dict[str, float], dict[str, float]]:
    loss, divergence = trial.losses(), trial.divergence(before)
    trial.settle()
    if not (math.isfinite(loss) and math.isfinite(divergence)):
        raise ValueError(
            f"after the trial's steps the loss is {loss} and the divergence {divergence}: train with a lower rate"
        )
    mine: dict[str, tuple[float, float]] = {}
    with processes.failing_together():
        for weight in weights[processes.rank :: processes.world_size]:
            with _at_the_start(weight, starts):
                mine[weight.name] = (trial.losses() - loss, divergence - trial.divergence(before))
                trial.settle()
            tick(1)
    found = {name: pair for share in processes.gather(mine) for name, pair in share.items()}
    signal = {weight.name: max(0.0, found[weight.name][0]) for weight in weights}
    sensitivity = {weight.name: max(0.0, found[weight.name][1]) for weight in weights}
    require_finite({name: value for name, (value, _) in found.items()}, "signal")
    require_finite({name: value for name, (_, value) in found.items()}, "sensitivity")
    least = _LEAST * math.fsum(sensitivity.values()) / len(sensitivity)
    return signal, {name: max(value, least) for name, value in sensitivity.items()}


@contextmanager
def _at_the_start(weight: Weight, starts: dict[int, Tensor]) -> Iterator[None]:
    """Take a candidate's movement back, and forth again."""
    index = () if weight.part is None else weight.part.index
    moved = []
    for parameter in weight.parameters:
        entries = parameter.detach()[index] if index else parameter.detach()
        start = starts[id(parameter)]
        moved.append((entries, entries.clone()))
        entries.copy_(start[index] if index else start)
    try:
        yield
    finally:
        for entries, value in moved:
            entries.copy_(value)
