"""Sensitivity along movements, with all cross terms: what tensors change together in what the pretrained model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kappa_lightning.probes.output import OutputDistribution
from kappa_lightning.processes import Processes
from kappa_lightning.weights import Weight

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

SHARE = 1 / 8
"""Of a movement in float32 that a derivative is taken over; below that, rounding takes all of it (a whole one is)."""

SKETCHED = 2**16
"""Entries of an output's embedding above which it is projected to as many."""


def interactions(
    weights: Sequence[Weight],
    moved: Mapping[int, Tensor],
    outputs: Iterable[tuple[int, Callable[[], OutputDistribution]]],
    *,
    processes: Processes | None = None,
    settle: Callable[[], None] = lambda: None,
) -> tuple[Matrix, int]:
    """M_TU = Δ_Tᵀ F Δ_U for the movements Δ of all pairs of candidates, averaged over the rows of a reference.

    With φ the embedding of the outputs (:meth:`~kappa_lightning.probes.output.OutputDistribution.embed`), whose
    distances are those of the Fisher information F, the derivative of φ along one tensor's movement is taken by a
    forward pass with a share of that movement, all others being where they were. The inner products of these
    derivatives are M. Moving the tensors of a set S together changes the outputs by ½ Σ_{T,U∈S} M_TU nats a row to
    second order: with the terms between the entries of a tensor and between tensors, which ΣF_ii leaves out.

    Outputs of more than :data:`SKETCHED` entries are projected by a count sketch (Charikar et al., 2002), which keeps
    inner products on average. The weights are afterwards as before, bit for bit. Call it without gradients, in eval
    mode.

    Args:
        weights: the candidates.
        moved: by how much each of their parameters moves, by its id.
        outputs: for each batch (of this process) its number among all, and what gives its output distribution.
        processes: who has a share of the batches; only this one if ``None``.
        settle: called when forward passes are over, before a weight is changed.

    Returns:
        M in the order of the weights, in nats a row, and the number of rows.

    Raises:
        ValueError: if there is no row, or a figure is not finite.
    """
    together = processes or Processes()
    share = SHARE if all(weight.dtype in (torch.float32, torch.float64) for weight in weights) else 1.0
    total: Matrix = np.zeros((len(weights), len(weights)))
    rows = 0
    with together.failing_together():
        for number, output in outputs:
            said = output()
            start, count = said.embed(), len(said)
            settle()
            derivatives = []
            for weight in weights:
                with _moved(weight, moved, share):
                    derivatives.append(_sketched((output().embed() - start) / share, number))
                    settle()
            each = torch.stack(derivatives).double().cpu()
            total += (each @ each.T).numpy()
            rows += count
    shares = together.gather((rows, total))
    rows = sum(count for count, _ in shares)
    if rows == 0:
        raise ValueError("the reference gave no output to measure sensitivity of: give batches with some")
    found: Matrix = np.sum([part for _, part in shares], axis=0) / rows
    if not np.isfinite(found).all():
        name = weights[int(np.argwhere(~np.isfinite(found))[0, 0])].name
        raise ValueError(
            f"the sensitivity of {name} along its movement is not finite: train with a lower rate, or check the weights"
        )
    return (found + found.T) / 2, rows


@contextmanager
def _moved(weight: Weight, moved: Mapping[int, Tensor], share: float) -> Iterator[None]:
    """A candidate by a share of its movement away from where it is."""
    index = () if weight.part is None else weight.part.index
    before = []
    for parameter in weight.parameters:
        entries, movement = parameter.detach(), moved[id(parameter)]
        if index:
            entries, movement = entries[index], movement[index]
        before.append((entries, entries.clone()))
        entries.add_(movement, alpha=share)
    try:
        yield
    finally:
        for entries, value in before:
            entries.copy_(value)


def _sketched(entries: Tensor, number: int) -> Tensor:
    if entries.numel() <= SKETCHED:
        return entries
    generator = torch.Generator(entries.device).manual_seed(number)
    place = torch.randint(SKETCHED, entries.shape, generator=generator, device=entries.device)
    sign = torch.randint(2, entries.shape, generator=generator, device=entries.device) * 2 - 1
    return entries.new_zeros(SKETCHED).index_add_(0, place, entries * sign)
