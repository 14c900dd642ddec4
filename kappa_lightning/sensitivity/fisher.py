"""Sensitivity: how much moving a tensor changes what the pretrained model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kappa_lightning.processes import Processes
from kappa_lightning.sensitivity.gradients import clear, entries, require_finite, sum_of_squares
from kappa_lightning.sensitivity.signal import backward
from kappa_lightning.weights import Weight


class Samplable(Protocol):
    """What is needed of an output distribution: n rows, samples of them, and their log-probabilities."""

    def __len__(self) -> int:
        """n."""

    def sample(self, generator: torch.Generator) -> Any:
        """An outcome for each row."""

    def log_prob(self, outcomes: Any) -> Tensor:
        """Shape (n,)."""


def sensitivities(
    weights: Sequence[Weight],
    outputs: Iterable[tuple[int, Callable[[], Samplable]]],
    *,
    draws: int = 1,
    seed: int = 0,
    processes: Processes | None = None,
) -> tuple[dict[str, float], int]:
    """The sensitivity c of each candidate: the trace of its Fisher information, averaged over the outputs.

    F_ii = E_x E_{y∼p(y|x)} [(∂ ln p(y|x)/∂w_i)²], with labels y drawn from the model itself; with the data's labels it
    would be another quantity (Kunstner et al., arXiv 1905.12558). Moving the entries by a small Δ changes the output
    distribution by KL = ½ Σ_i F_ii Δ_i² nats a row, off-diagonals aside.

    For one draw of labels for all n rows of a batch, g = ∇ Σ_r ln p(y_r|x_r) has E[g_i²] = Σ_r F_ii(x_r), since the
    scores of independent labels are independent with mean zero. So one backward pass for a whole batch gives an
    unbiased estimate of its sum, without a gradient for each row; what it costs is variance, which falls with the
    number of batches and draws and with that of entries that a tensor has.

    Call it within :func:`~kappa_lightning.sensitivity.gradients.differentiating`, with the model in eval mode.

    Args:
        weights: the candidates.
        outputs: for each batch (of this process) its number among all, and a function that returns its output
            distribution with a graph.
        draws: how often labels are drawn for each batch; each costs a forward and a backward pass.
        seed: of the labels, together with the number of the batch.
        processes: who has a share of the batches; only this one if ``None``.

    Returns:
        c by name, in nats a row per squared unit of weight, and how many rows there were.

    Raises:
        ValueError: if there is no row, or a log-probability is not finite or has no gradient.
    """
    together = processes or Processes()
    device = weights[0].parameters[0].device
    totals = {weight.name: 0.0 for weight in weights}
    rows = 0
    with together.failing_together():
        for number, output in outputs:
            for draw in range(draws):
                clear(weights)
                distribution = output()
                if len(distribution) == 0:
                    break
                generator = torch.Generator(device).manual_seed((seed * 1_000_003 + number) * 1_009 + draw)
                log_prob = distribution.log_prob(distribution.sample(generator))
                backward(log_prob.sum())
                for weight in weights:
                    totals[weight.name] += sum_of_squares(entries(weight))
                rows += len(distribution)
                del distribution, log_prob
        clear(weights)
    rows, totals = _added(together.gather((rows, totals)))
    if rows == 0:
        raise ValueError("the reference gave no output to measure sensitivity of: give batches with some")
    found = {name: total / rows for name, total in totals.items()}
    require_finite(found, "sensitivity")
    return found, rows


def _added(shares: Sequence[tuple[int, dict[str, float]]]) -> tuple[int, dict[str, float]]:
    names = shares[0][1]
    return sum(rows for rows, _ in shares), {name: sum(totals[name] for _, totals in shares) for name in names}
