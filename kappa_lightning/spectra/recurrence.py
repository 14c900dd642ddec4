"""The state of a block Lanczos run, and the measurement of what lower precision did to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.random_blocks import BLOCK, OVERLAP, gaussian_block

PROBE_SEED = 0x7265_6375


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Where k steps of block Lanczos have come to: M[Q₁ … Q_k] = [Q₁ … Q_k]T + Q_{k+1}B_kE_kᵀ.

    Attributes:
        basis: the rows of Q₁ … Q_{k+1}, shape (batch, 16(k + 1), n), in the run's precision.
        tridiagonal: T, shape (batch, 16k, 16k), float64; 0 where lost.
        coupling: B_k, shape (batch, 16, 16), float64.
        lost: whose numbers have overflown, shape (batch,).
    """

    basis: Tensor
    tridiagonal: Tensor
    coupling: Tensor
    lost: Tensor


@dataclass(frozen=True, slots=True)
class RecurrenceProbe:
    r"""Measures what is wrong with a block Lanczos recurrence that was computed in lower precision.

    With M the operator, E = M[Q₁ … Q_k] − [Q₁ … Q_k]T − Q_{k+1}B_kE_kᵀ and D = QᵀQ − I of Q = [Q₁ … Q_{k+1}], both as
    the numbers stand, the stack of [E 0] and σD is applied in float64 to a Gaussian block G, where σ is the largest
    number on the diagonal of T. Its norm, and so that of either part, is below ‖·G‖_F / 0.6 except with probability
    2.4e-11. The argument of :func:`.certificate.largest_eigenvalue_interval` then holds with ‖E‖₂ as the error of the
    recurrence, and the Ritz vector s has a Rayleigh quotient of at least θ − ‖E‖₂/√(1−d) − d‖B_k‖/(1−d), where
    d = ‖D‖₂.

    Attributes:
        recurrence: what is measured.
        gaussian: Gᵀ, shape (batch, 16, 16(k + 1)).
        vectors: what M must be applied to, shape (batch, 16, n), float64.
    """

    recurrence: Recurrence
    gaussian: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, recurrence: Recurrence, seed: int = PROBE_SEED) -> "RecurrenceProbe":
        """Draw G; no choice of the run may have been made with the block of this seed."""
        spanned, inner = recurrence.basis, recurrence.tridiagonal.shape[-1]
        block = gaussian_block(spanned.shape[-2], seed, spanned.device)
        gaussian = block.mT.expand(len(spanned), -1, -1)
        return cls(recurrence, gaussian, gaussian[..., :inner] @ spanned[:, :inner].to(torch.float64))

    def errors(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return bounds of ‖E‖₂ and of d, shape (batch,), given M applied to ``vectors`` in float64."""
        wide = self.recurrence.basis.to(torch.float64)
        tridiagonal, coupling = self.recurrence.tridiagonal, self.recurrence.coupling
        inner = tridiagonal.shape[-1]
        seen, rest = self.gaussian[..., :inner], self.gaussian[..., inner:]
        error = torch.baddbmm(image, seen @ tridiagonal, wide[:, :inner], alpha=-1.0)
        error = torch.baddbmm(error, seen[..., -BLOCK:] @ coupling.mT, wide[:, inner:], alpha=-1.0)
        skew = torch.baddbmm(self.gaussian, torch.baddbmm(self.vectors, rest, wide[:, inner:]), wide.mT, beta=-1.0)
        scale = tridiagonal.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(wide.dtype).tiny)
        both = torch.hypot(torch.linalg.matrix_norm(error), scale * torch.linalg.matrix_norm(skew)) / OVERLAP
        return both, both / scale
