"""All matrices train, each with steps of its own length: a learning rate for each tensor in place of a yes or no.

The length is a function of the pretrained weights alone. It multiplies what the optimizer did, which for one without
weight decay is the same as a learning rate for each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kappa_lightning import KappaProfile
from kappa_lightning.selection import Scorable, criterion_of, rank
from kappa_lightning.weights import plain_parameters


def _inverse_kappa(row: Scorable) -> float:
    return 1 / row.kappa


def _inverse_log_kappa(row: Scorable) -> float:
    return 1 / (1 + math.log(row.kappa))


def _size(row: Scorable) -> float:
    """The root mean square of the entries."""
    return row.frobenius_norm / math.sqrt(row.num_parameters)


def _alike(row: Scorable) -> float:
    return 1.0


LENGTHS = {
    "alike": _alike,
    "1/kappa": _inverse_kappa,
    "1/(1+ln kappa)": _inverse_log_kappa,
    "rms": _size,
}
"""The length of a matrix's steps up to a constant, by name; ``rank:`` and a criterion give 1 − (place − ½)/n."""

RANK = "rank:"


def check_length(name: str) -> None:
    """Raise a ValueError if there is no such step length."""
    if name.startswith(RANK):
        criterion_of(name.removeprefix(RANK))
    elif name not in LENGTHS:
        raise ValueError(f"step length {name!r} is none of {', '.join(LENGTHS)}, {RANK}<criterion>")


def step_lengths(profile: KappaProfile, name: str) -> dict[str, float]:
    """The factor of each matrix's steps, of which the largest is 1.

    Args:
        profile: of the matrices that train.
        name: a key of :data:`LENGTHS`, or ``rank:`` and a criterion.

    Raises:
        ValueError: if there is no such name or criterion, or no matrix would move.

    Example:
        >>> net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "ab"})
        >>> for layer, kappa in zip(net.values(), (2.0, 8.0)):
        ...     _ = layer.weight.data.copy_(torch.diag(torch.tensor([kappa, 1.0])))
        >>> profile = KappaProfile.from_model(net, progress=False)
        >>> {name: round(length, 3) for name, length in step_lengths(profile, "1/kappa").items()}
        {'a.weight': 1.0, 'b.weight': 0.25}
        >>> step_lengths(profile, "rank:kappa")["b.weight"]
        0.3333333333333333
    """
    check_length(name)
    if name.startswith(RANK):
        ranking = rank(profile, name.removeprefix(RANK))
        lengths = {row.name: 1 - (place + 0.5) / len(ranking) for place, row in enumerate(ranking)}
    else:
        lengths = {row.name: LENGTHS[name](row) for row in profile}
    largest = max(lengths.values())
    if not largest > 0:
        raise ValueError(f"step length {name!r} is 0 for every matrix: nothing would train")
    return {matrix: length / largest for matrix, length in lengths.items()}


class StepLengths(pl.Callback):
    """Multiply every optimizer step of some parameters, each by its own factor.

    Args:
        lengths: the factors by name, as :func:`step_lengths` gives them.
    """

    def __init__(self, lengths: Mapping[str, float]) -> None:
        self.lengths = dict(lengths)
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remember where the parameters are."""
        parameters = plain_parameters(pl_module)
        self._before = [(parameters[name], parameters[name].clone(), length) for name, length in self.lengths.items()]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the part of the step that is too long back."""
        for parameter, before, length in self._before:
            parameter.copy_(torch.lerp(before, parameter, length))
        self._before = []
