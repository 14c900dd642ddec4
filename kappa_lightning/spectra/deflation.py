"""The largest eigenvalue of one small operator: found by subspace iteration, and shown to be the largest by deflation.

For matrices of a few hundred columns block Lanczos spends its time on the bookkeeping of its steps. Here a block of 16
vectors is filtered by a Chebyshev polynomial until it holds the top of the spectrum (Zhou, Saad, Tiago, Chelikowsky, J.
Comput. Phys. 219, 2006), and a second random block tells how large the rest of the spectrum can be, which only has to
be known up to the gap between the first eigenvalue and the seventeenth.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kappa_lightning.spectra.products import Operator
from kappa_lightning.spectra.random_blocks import BLOCK, OVERLAP, gaussian_block

_SEARCH_SEED = 0x6669_6C74
# Of the distance between what was asked for and the edge of the filter, what the residual of the block may cost. The
# proof would be content with a quarter; this makes the values as right as float32 singular values are, for a step more.
# Measured against its neighbors by benchmarks/ablation.py.
_RESIDUAL_SHARE = 2e-4
_MOST_FILTERS = 4
_LARGEST_DEGREE = 12
_MOST_STEPS = 24
# Its hyperbolic cosine times the steps is a float.
_LARGEST_ANGLE = 29.0


@dataclass(frozen=True, slots=True)
class Deflation:
    r"""An operator M in the basis of an orthonormal block V of 16 rows and of what is orthogonal to it.

    With Θ = VMVᵀ, E = VM − ΘV and P = I − VᵀV, no eigenvalue of M lies above τ if PMP has none above c and
    Θ + EEᵀ/(τ − c) ≤ τ, the Schur complement of τ − M then being positive semidefinite. The largest such c is

    .. math:: c = \tau - \|(\tau - \Theta)^{-1/2} E\|_2^2.

    Attributes:
        vectors: V, shape (16, n), float64.
        ritz: θ, the largest eigenvalue of Θ, a lower bound of that of M.
        upper: τ.
        edge: the smallest eigenvalue of Θ, near which the rest of the spectrum of M begins.
        allowed: c.
    """

    vectors: Tensor
    ritz: float
    upper: float
    edge: float
    allowed: float

    @classmethod
    def of(cls, vectors: Tensor, image: Tensor, tolerance: float) -> "Deflation":
        """Take the block and M applied to it, both float64 of shape (16, n); τ is (1 + tolerance)·θ."""
        projected = image @ vectors.mT
        if not bool(projected.isfinite().all()):
            return cls(vectors, math.nan, math.nan, math.nan, math.nan)
        values, basis = torch.linalg.eigh((projected + projected.mT) / 2)
        residual = basis.mT @ torch.addmm(image, projected, vectors, alpha=-1.0)
        edge, ritz = values[0].item(), values[-1].item()
        upper = (1 + tolerance) * ritz
        weighted = residual / (upper - values).sqrt()[:, None]
        cost = torch.linalg.eigvalsh(weighted @ weighted.mT)[-1].item()
        return cls(vectors, ritz, upper, edge, upper - cost)

    @property
    def is_usable(self) -> bool:
        """Whether the rest of the spectrum may begin above the edge and still be below what is allowed."""
        return 0 < self.edge < self.allowed < math.inf

    def affords(self, error: float) -> bool:
        """Whether :meth:`is_shown` may succeed with an operator of this error: it costs less than half the overlap."""
        if not self.is_usable:
            return False
        length = math.sqrt(BLOCK * self.vectors.shape[-1])
        return 4 / self.edge * error * length < OVERLAP / 2 * math.sinh(self._angle(self.allowed))

    @property
    def is_close(self) -> bool:
        """Whether the block is so good that a better one would not make the proof much shorter."""
        return self.upper - self.allowed <= _RESIDUAL_SHARE * (self.upper - self.edge)

    def is_shown(self, operator: Operator, error: float, seed: int, first: Tensor | None = None) -> bool:
        r"""Show that no eigenvalue of M lies above τ, except with a probability of 2.4e-11 over the block of a seed.

        Let Y₀ = ΩP of a Gaussian block Ω and Y_j = T_j(2PMP/b − 1)Y₀ by the recurrence of the Chebyshev polynomials. Of
        an eigenvector u of PMP of eigenvalue λ > b, Y_j holds T_j(2λ/b − 1) times what Ω has held, so that λ ≥ c is
        ruled out once

        .. math:: \|Y_j\|_F + \sum_{i<j} U_{j-1-i}(x) f_i < 0.6\, T_j(x), \qquad x = 2c/b - 1,

        with f_i a bound of the rounding of step i. Divided by T_j(x) all terms on the left fall with x, so one point
        is enough.

        Args:
            operator: M, for blocks of shape (16, n).
            error: bound of ‖fl(YM) − YM‖_F / ‖Y‖_F; it may grow no faster than ‖M‖.
            seed: of the block, another one than V comes from.
            first: the operator applied to :func:`probe`, if it is known.
        """
        if not self.is_usable:
            return False
        scale = 4 / self.edge
        angle = self._angle(self.allowed)
        before = probe(self.vectors, seed)
        first = operator(before) if first is None else first
        block = _projected(torch.add(first * (scale / 2), before, alpha=-1.0), self.vectors)
        lost = [scale * error * torch.linalg.vector_norm(before).item()]
        for step in range(1, _MOST_STEPS + 1):
            size = torch.linalg.vector_norm(block).item()
            rounding = sum(math.sinh((step - i) * angle) * one for i, one in enumerate(lost)) / math.sinh(angle)
            if size + rounding < OVERLAP * math.cosh(step * angle):
                return True
            if not size < math.inf or step == _MOST_STEPS:
                return False
            lost.append(scale * error * size)
            following = (operator(block) * scale).sub_(before).sub_(block, alpha=2.0)
            before, block = block, _projected(following, self.vectors)
        return False

    def _angle(self, value: float) -> float:
        """The arcosh of 2·value/b − 1; at most one with which T_j can be computed, which is that of a smaller value."""
        return min(math.acosh(2 * value / self.edge - 1), _LARGEST_ANGLE)


def probe(vectors: Tensor, seed: int) -> Tensor:
    """The Gaussian block of a seed without what it has in V; both of shape (16, n)."""
    return _projected(gaussian_block(vectors.shape[-1], seed, vectors.device).mT, vectors)


def _projected(block: Tensor, vectors: Tensor) -> Tensor:
    return torch.addmm(block, block @ vectors.mT, vectors, alpha=-1.0)


def find_top(operator: Operator, size: int, tolerance: float, powers: int) -> Deflation:
    """Find the top of the spectrum of a positive semidefinite operator; nothing that is shown rests on how.

    Args:
        operator: M, for blocks of shape (16, n), float64 in and out.
        size: n, at least 32.
        tolerance: wanted relative width of the bracket.
        powers: how often M is applied before the block is looked at for the first time.
    """
    image = start(size)
    for _ in range(powers):
        image = operator(image)
    for attempt in range(_MOST_FILTERS + 1):
        vectors = orthonormal(image)
        image = operator(vectors)
        found = Deflation.of(vectors, image, tolerance)
        if attempt == _MOST_FILTERS or found.is_close or not 0 < found.edge < found.upper:
            break
        image = _filtered(operator, found, image)
    return found


def _filtered(operator: Operator, found: Deflation, image: Tensor) -> Tensor:
    """T_d(2M/b − 1) of the block, of the degree that seems to be needed; ``image`` is M of it."""
    excess = (found.upper - found.allowed) / (_RESIDUAL_SHARE * (found.upper - found.edge))
    wanted = math.acosh(2 * math.sqrt(max(excess, 1.0))) / found._angle(found.upper)
    degree = math.ceil(min(_LARGEST_DEGREE, wanted))
    scale = 4 / found.edge
    before, block = found.vectors, torch.add(image * (scale / 2), found.vectors, alpha=-1.0)
    for _ in range(degree - 1):
        before, block = block, (operator(block) * scale).sub_(before).sub_(block, alpha=2.0)
    return block


def orthonormal(block: Tensor) -> Tensor:
    """Rows that span what those of a block do."""
    rows: Tensor = torch.linalg.qr(block.mT).Q.mT
    return rows


@lru_cache(maxsize=32)
def start(size: int) -> Tensor:
    """Sixteen random orthonormal rows."""
    return orthonormal(gaussian_block(size, _SEARCH_SEED, torch.device("cpu")).mT).contiguous()
