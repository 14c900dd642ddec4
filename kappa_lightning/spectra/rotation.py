"""A rotation of columns that sets the dominant directions of a matrix apart, so that float32 can factor the rest.

A trained weight is noise with a few learned directions on top, whose singular values are tens of times larger. What
rounding does to a Gram matrix and to its Cholesky factor does not depend on the length of the columns, though, only on
κ once each has been divided by its length (Demmel, LAPACK Working Note 14, 1989). In coordinates whose first axes are
the dominant directions, these directions are nothing but long columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.certificate import bracket_prospect
from kappa_lightning.spectra.lanczos import QuickRun, lanczos_steps, most_steps
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.products import gram_product
from kappa_lightning.spectra.random_blocks import BLOCK, Start

_RANGE_SEED = 0x726F_7461
# Enough for directions that stand out, and for a bracket of the first of them.
# Measured against its neighbors by benchmarks/ablation.py.
_STEPS = 3


@dataclass(frozen=True, slots=True)
class Rotation:
    """Orthogonal matrices H = I − Y S Yᵀ, products of 16 Householder reflections (Schreiber and Van Loan, SIAM J. Sci.
    Stat. Comput. 10, 1989).

    H is orthogonal whatever Y is, if only S⁻¹ + S⁻ᵀ = YᵀY, and S is computed from Y in float64.

    Attributes:
        reflectors: Yᵀ, shape (count, 16, n), float64.
        kernel: S, shape (count, 16, 16), float64.
    """

    reflectors: Tensor
    kernel: Tensor

    @classmethod
    def onto_first_axes(cls, directions: Tensor) -> "Rotation":
        """Return H whose first 16 columns are, up to signs, orthonormal directions given as (count, 16, n)."""
        packed, _ = torch.geqrf(directions.to(torch.float64).mT)
        identity = torch.eye(*packed.shape[-2:], dtype=packed.dtype, device=packed.device)
        y = packed.tril(-1) + identity
        products = y.mT @ y
        halved = products.triu(1) + torch.diag_embed(products.diagonal(dim1=-2, dim2=-1) / 2)
        kernel = torch.linalg.solve_triangular(halved, identity[:BLOCK].expand_as(halved), upper=True)
        return cls(y.mT.contiguous(), kernel)

    def of_rows(self, block: Tensor) -> Tensor:
        """Rotate rows: X ↦ XH, a new tensor, for X of shape (count, rows, n), in its own dtype."""
        reflectors, kernel = self.reflectors.to(block.dtype), self.kernel.to(block.dtype)
        # Of a copy, which has the order of its dimensions in memory; that of a new result can be the slow one.
        # A transposed block is multiplied twice as fast from its own side.
        return block.clone().baddbmm_((reflectors @ block.mT).mT, kernel @ reflectors, alpha=-1.0)

    def back(self, block: Tensor) -> Tensor:
        """Undo :meth:`of_rows`: X ↦ XHᵀ, a new tensor."""
        reflectors, kernel = self.reflectors.to(block.dtype), self.kernel.to(block.dtype)
        return torch.baddbmm(block, block @ reflectors.mT, kernel.mT @ reflectors, alpha=-1.0)


def dominant_rotation(matrices: TallMatrices, rows: int, tolerance: float) -> tuple[Rotation, QuickRun | None]:
    """Find approximate dominant right singular vectors by three steps of block Lanczos on AᵀA in float32.

    Nothing rests on their accuracy: any rotation leaves the singular values as they are. Where a direction stands out,
    the same steps can also bracket σ_max(A)².

    Args:
        matrices: shape (count, m, n), n ≥ 48.
        rows: how many rows to convert at a time.
        tolerance: wanted relative width of the bracket.

    Returns:
        The rotation, and the run, if it may give such brackets for the whole stack once it has been measured.
    """
    start = Start.random(matrices.cols, _RANGE_SEED, matrices.entries.device).rounded(torch.float32)
    steps = lanczos_steps(
        lambda block: gram_product(block, matrices.row_blocks(block.dtype, rows)),
        start,
        matrices.count,
        min(_STEPS, most_steps(matrices.cols)),
        torch.float32,
    )
    *_, recurrence = steps
    run = QuickRun.of(recurrence, start, tolerance, _RANGE_SEED + 1)
    # The largest first, and one direction to an axis: two that shared theirs would be as ill-conditioned as before.
    rotation = Rotation.onto_first_axes(run.pairs.vectors(recurrence.basis[:, :-BLOCK], BLOCK).flip(-2))
    h, _ = bracket_prospect(recurrence, start, tolerance, run.pairs.values[..., -1])
    return rotation, run if bool((h < start.overlap).all()) else None
