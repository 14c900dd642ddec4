"""Block Lanczos for the largest eigenvalue of a positive semidefinite operator, with a bracket that holds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.certificate import (
    RitzPairs,
    bracket_prospect,
    largest_eigenvalue_interval,
)
from kappa_lightning.spectra.products import Operator
from kappa_lightning.spectra.random_blocks import BLOCK, Start
from kappa_lightning.spectra.recurrence import PROBE_SEED, Recurrence, RecurrenceProbe

MAX_STEPS = 40
BASIS_COLUMNS = BLOCK * (MAX_STEPS + 1)
# A Cholesky factor with nothing smaller on its diagonal magnifies no rounding error that could matter.
_ORTHONORMAL = 0.9
# Of the steps that a run seems to need still, the share that it takes before it is asked again.
# Measured against its neighbors by benchmarks/ablation.py.
_PATIENCE = 0.7
# The share of the overlap that h must be below before a run in float32 is measured, which costs as much as five steps:
# the grid and the error of the recurrence take their part. Of seven attempts between 0.82 and 0.98 five were in vain.
# Measured against its neighbors by benchmarks/ablation.py.
_WORTH_MEASURING = 0.75
# How often a run in float32 is measured before it is given up; the certificate counts them.
_MEASUREMENTS = 3
# ‖QᵀQ − I‖ up to which a basis in float32 is taken for orthonormal.
_MOST_SKEW = 1e-3
START_SEED = 0x6B61_7070


@dataclass(frozen=True, slots=True)
class LargestEigenvalue:
    """What a run of block Lanczos knows about the largest eigenvalue of each operator of a batch.

    Attributes:
        lower: no eigenvalue is the largest below this; shape (batch,).
        ritz: the largest Ritz value, far closer than the ends; ``lower`` itself unless the run was in float32.
        upper: none is above this; further away than asked, or inf, where the run did not settle within its steps.
        basis: the rows of Q₁ … Q_k, shape (batch, 16k, n), in the run's precision.
        pairs: the eigendecomposition of T, shapes (batch, 16k) and (batch, 16k, 16k), float64.
    """

    lower: Tensor
    ritz: Tensor
    upper: Tensor
    basis: Tensor
    pairs: RitzPairs

    def ritz_vectors(self, count: int) -> Tensor:
        """The vectors of the largest Ritz values as rows, shape (batch, count, n), float64."""
        return self.pairs.vectors(self.basis, count)

    def settled(self, tolerance: float) -> Tensor:
        """Whether the bracket is as narrow as that, shape (batch,)."""
        return self.upper <= (1 + tolerance) * self.lower


@dataclass(frozen=True, slots=True)
class QuickRun:
    """A run in float32, of which nothing is certain before it has been measured in float64.

    Attributes:
        probe: what has to be measured.
        pairs: of T.
        start: the block that the run started from.
        tolerance: wanted (upper − lower) / lower.
    """

    probe: RecurrenceProbe
    pairs: RitzPairs
    start: Start
    tolerance: float

    @classmethod
    def of(cls, recurrence: Recurrence, start: Start, tolerance: float, probe_seed: int = PROBE_SEED) -> "QuickRun":
        """Take a run as it stands."""
        return cls(RecurrenceProbe.of(recurrence, probe_seed), RitzPairs.of(recurrence.tridiagonal), start, tolerance)

    def measured(self, image: Tensor, roundoff: Callable[[Tensor], Tensor] = torch.zeros_like) -> LargestEigenvalue:
        """Bracket as :func:`.certificate.largest_eigenvalue_interval` does, with the measured errors.

        Args:
            image: the operator applied in float64 to ``probe.vectors``, shape (batch, 16, n).
            roundoff: see :func:`largest_eigenvalue`.
        """
        recurrence = self.probe.recurrence
        error, skew = self.probe.errors(image)
        ritz, upper = largest_eigenvalue_interval(
            self.pairs,
            recurrence.coupling,
            # uᵀ[Q₁ … Q_{k+1}] may be a little longer than u.
            self.start.of_length(1 + _MOST_SKEW),
            self.tolerance,
            lambda top: 1e-12 + roundoff(top) + error / top,
        )
        reach = torch.linalg.matrix_norm(recurrence.coupling)
        lower = ritz - error / (1 - skew).sqrt() - skew * reach / (1 - skew)
        sound = (skew < _MOST_SKEW) & (lower > 0) & ~recurrence.lost
        return LargestEigenvalue(
            lower.where(sound, 0.0),
            ritz.where(sound, 0.0),
            upper.where(sound, torch.inf),
            recurrence.basis[:, :-BLOCK],
            self.pairs,
        )

    def if_settled(self, image: Tensor) -> LargestEigenvalue | None:
        """The brackets of :meth:`measured`, if all of them are as narrow as wanted."""
        found = self.measured(image)
        return found if bool(found.settled(self.tolerance).all()) else None


def largest_eigenvalue(
    operator: Operator,
    size: int,
    batch: int,
    *,
    device: torch.device,
    tolerance: float,
    roundoff: Callable[[Tensor], Tensor] = torch.zeros_like,
    exact: Operator | None = None,
    probe_seed: int = PROBE_SEED,
) -> LargestEigenvalue:
    """Bracket the largest eigenvalue of a batch of symmetric positive semidefinite operators.

    The whole batch takes the same steps; the host asks whether it has settled, after each of the first ones and then
    less often, as far as the end seems to be away.

    Args:
        operator: maps (batch, 16, size) to the same shape: blocks come as rows, the layout in which float64 products
            with a large matrix run several times faster on a CPU.
        size: the order n of the operator.
        batch: how many operators there are.
        device: where to work.
        tolerance: wanted (upper − lower) / lower.
        roundoff: maps a largest eigenvalue to the relative error of one application of the operator in float64, both of
            shape (batch,), beside the 1e-12 that is always allowed for.
        exact: the operator in float64, if the run and ``operator`` are to be in float32; what that did to the
            recurrence is measured with it.
        probe_seed: of the block with which it is measured; what ``tolerance`` was made with must not depend on it.

    Returns:
        The ends of :func:`.certificate.largest_eigenvalue_interval`, and the Ritz value with its vectors. Lower end,
        Ritz value and upper end are 0, 0 and inf for an operator whose numbers overflow.
    """
    dtype = torch.float64 if exact is None else torch.float32
    start = Start.random(size, START_SEED, device).rounded(dtype)
    found: LargestEigenvalue | None = None
    for attempt, recurrence in enumerate(worth_bracketing(operator, start, batch, tolerance, dtype), start=1):
        if exact is None:
            pairs = RitzPairs.of(recurrence.tridiagonal)
            ritz, upper = largest_eigenvalue_interval(
                pairs, recurrence.coupling, start, tolerance, lambda top: 1e-12 + roundoff(top)
            )
            ritz, upper = ritz.masked_fill(recurrence.lost, 0.0), upper.masked_fill(recurrence.lost, torch.inf)
            found = LargestEigenvalue(ritz, ritz, upper, recurrence.basis[:, :-BLOCK], pairs)
        else:
            run = QuickRun.of(recurrence, start, tolerance, probe_seed)
            found = run.measured(exact(run.probe.vectors), roundoff)
        given_up = exact is not None and attempt == _MEASUREMENTS
        if given_up or bool((recurrence.lost | found.settled(tolerance)).all()):
            break
    assert found is not None, "the last step is always worth it"
    return found


def quick_run(operator: Operator, size: int, batch: int, *, device: torch.device, tolerance: float) -> QuickRun:
    """Take steps in float32 until they seem to be enough, and leave the measurement to the caller.

    Args:
        operator: maps (batch, 16, size) to the same shape, in float32.
        size: the order n of the operator.
        batch: how many operators there are.
        device: where to work.
        tolerance: wanted (upper − lower) / lower.
    """
    start = Start.random(size, START_SEED, device).rounded(torch.float32)
    return QuickRun.of(next(worth_bracketing(operator, start, batch, tolerance, torch.float32)), start, tolerance)


def worth_bracketing(
    operator: Operator, start: Start, batch: int, tolerance: float, dtype: torch.dtype
) -> Iterator[Recurrence]:
    """Take steps of block Lanczos, and show those after which a bracket may be narrow enough, and the last one.

    Args:
        operator: maps (batch, 16, n) to the same shape, in ``dtype``.
        start: Q₁ and what it stands for.
        batch: how many operators there are.
        tolerance: wanted (upper − lower) / lower.
        dtype: float64 or float32, the precision of the vectors.
    """
    steps = most_steps(len(start.block))
    enough = start.overlap * (1.0 if dtype == torch.float64 else _WORTH_MEASURING)
    ritz = start.block.new_zeros(batch)
    ask_again, asked, previous = 1, 0, math.inf
    for step, recurrence in enumerate(lanczos_steps(operator, start, batch, steps, dtype)):
        if step == steps - 1:
            yield recurrence
        elif step >= ask_again:
            h, ritz = bracket_prospect(recurrence, start, tolerance, ritz)
            distance = math.log(max(float((h / enough).masked_fill(recurrence.lost, 0.0).max()), 0.1))
            if distance < 0:
                yield recurrence
            else:
                ask_again = step + _steps_to_skip(distance, (previous - distance) / (step - asked))
                previous, asked = distance, step


def most_steps(size: int) -> int:
    """How many steps a run of this order takes at most: the basis must keep room for one more block."""
    steps = min(MAX_STEPS, size // BLOCK - 1)
    if steps < 2:
        raise ValueError(f"block Lanczos needs an operator of order at least {3 * BLOCK}, got {size}")
    return steps


def lanczos_steps(operator: Operator, start: Start, batch: int, steps: int, dtype: torch.dtype) -> Iterator[Recurrence]:
    """Take steps of block Lanczos, and show after each where they have come to.

    Sixteen vectors at a time, with full reorthogonalisation, because the block is what makes both the matrix products
    and the certificate cheap.

    Args:
        operator: maps (batch, 16, n) to the same shape, in ``dtype``.
        start: Q₁ and what it stands for.
        batch: how many operators there are.
        steps: how many to take.
        dtype: float64 or float32, the precision of the vectors.
    """
    size, device = len(start.block), start.block.device
    basis = torch.empty(batch, BLOCK * (steps + 1), size, dtype=dtype, device=device)
    basis[:, :BLOCK] = start.block.mT
    # Filler for directions in which the Krylov space ends (an orthogonal matrix ends it at once).
    filler = basis[:1, :BLOCK].roll(1, dims=-1) * (1e-14 if dtype == torch.float64 else 1e-7)
    tridiagonal = start.block.new_zeros(batch, 0, 0)
    coupling = start.block[:0]
    for step in range(steps):
        done = (step + 1) * BLOCK
        before, here = slice(done - 2 * BLOCK, done - BLOCK), slice(done - BLOCK, done)
        spanned = basis[:, :done]
        image = operator(basis[:, here])
        projection = image @ spanned.mT
        diagonal = projection[..., -BLOCK:].to(torch.float64)
        tridiagonal = torch.nn.functional.pad(tridiagonal, (0, BLOCK, 0, BLOCK))
        if step:
            tridiagonal[..., here, before] = coupling
            tridiagonal[..., before, here] = coupling.mT
        tridiagonal[..., here, here] = (diagonal + diagonal.mT) / 2
        image = torch.baddbmm(image, projection, spanned, alpha=-1.0)
        image = image + filler * torch.linalg.matrix_norm(diagonal).to(dtype)[..., None, None]
        # On a GPU the question would stop the host in every step.
        block, coupling = orthonormalize(image, spanned, may_ask=not image.is_cuda)
        coupling = coupling.to(torch.float64)
        basis[:, done : done + BLOCK] = block
        # The inverse of a matrix that is singular beyond float64's range overflows, and nothing can be said of it.
        lost = ~(tridiagonal.isfinite().all((-2, -1)) & coupling.isfinite().all((-2, -1)))
        yield Recurrence(
            basis[:, : done + BLOCK],
            tridiagonal.masked_fill(lost[:, None, None], 0.0),
            coupling.nan_to_num(),
            lost,
        )


def _steps_to_skip(distance: float, slope: float) -> int:
    """How many steps to take before asking again, with ln(h/overlap) = ``distance`` and so much less in each step."""
    return max(1, int(_PATIENCE * distance / slope)) if 0 < slope < math.inf and distance < math.inf else 1


def orthonormalize(image: Tensor, spanned: Tensor, may_ask: bool) -> tuple[Tensor, Tensor]:
    """Factor imageᵀ = blockᵀ @ coupling with the rows of block orthonormal and orthogonal to those of ``spanned``.

    Shifted Cholesky QR, three passes (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42,
    2020): matrix products and 16×16 factorizations only, where a GPU's batched Householder QR would dominate the run.
    The shift stands for directions that have ended, and is left out where none has: then two passes are enough.

    Args:
        image: shape (batch, 16, n).
        spanned: orthonormal rows, shape (batch, 16k, n).
        may_ask: whether to stop after two passes where they are enough; the host waits for the answer.

    Returns:
        block, shape (batch, 16, n), and coupling, shape (batch, 16, 16).
    """
    coupling = torch.eye(BLOCK, dtype=image.dtype, device=image.device)
    identity = coupling
    # About 45 units of rounding.
    level = 1e-14 if image.dtype == torch.float64 else 5e-6
    for sweep in range(3):
        if sweep:
            image = torch.baddbmm(image, image @ spanned.mT, spanned, alpha=-1.0)
        gram = image @ image.mT
        shift = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * level + torch.finfo(image.dtype).tiny
        settled = False
        if sweep == 0:
            factor = torch.linalg.cholesky_ex(gram + shift * identity).L
        else:
            factor = torch.linalg.cholesky_ex(gram + torch.finfo(image.dtype).tiny * identity).L
            orthonormal = (factor.diagonal(dim1=-2, dim2=-1) > _ORTHONORMAL).all(-1)
            settled = may_ask and bool(orthonormal.all())
            if sweep == 1 and not settled:
                shifted = torch.linalg.cholesky_ex(gram + shift * identity).L
                factor = torch.where(orthonormal[:, None, None], factor, shifted)
        # From the right on columns, whose result lies in memory as the rows that the products want.
        image = torch.linalg.solve_triangular(factor.mT, image.mT, upper=True, left=False).mT
        coupling = factor.mT @ coupling
        if settled:
            break
    return image, coupling
