"""Random blocks, on which all bounds of this package rest.

All use one fact about a Gaussian block Ω of 16 columns. For a fixed unit vector u the 16 entries of uᵀΩ are
independent standard normals, so ‖uᵀΩ‖² is χ² with 16 degrees of freedom, and P(χ²₁₆ ≤ t) = exp(−t/2) Σ_{j≥8} (t/2)ʲ/j!
is below 2.4e-11 at t = 0.36. Every use fails with at most that probability over the draw of Ω. A matrix that
climbs the whole ladder meets at most 39 uses: on the rung for few columns one measurement of the factor, one proof of
the top and two of the bottom; on each of the three other rungs with a factor one measurement of it and two Lanczos
runs, each of which starts at most twice (in float32 and in float64) and is measured at most three times in float32; and
the start and the measurement of the run for the rotation, with blocks of its own. Together that is below the 1e-9 that
the package states for each matrix.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 16
"""Columns of every random block; the probability above is for this number."""

OVERLAP = 0.6
"""‖uᵀΩ‖ is above this for a fixed unit vector u, except with probability 2.4e-11."""


@lru_cache(maxsize=32)
def gaussian_block(rows: int, seed: int, device: torch.device) -> Tensor:
    """Return the (rows, 16) standard normal block of a seed: float64, equal on all devices, private generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(rows, BLOCK, generator=generator, dtype=torch.float64, device="cpu").to(device)


@dataclass(frozen=True, slots=True)
class Start:
    """A random start block Ω = Q₁R, which sees every direction: ‖uᵀQ₁R‖ ≥ overlap·‖u‖ with the probability above.

    Attributes:
        block: Q₁, shape (n, 16), orthonormal columns, float64.
        triangle: R, shape (16, 16), float64.
        overlap: a lower bound of ‖uᵀQ₁R‖ over unit vectors u.
    """

    block: Tensor
    triangle: Tensor
    overlap: float

    @classmethod
    def random(cls, rows: int, seed: int, device: torch.device) -> "Start":
        """Draw the block of a seed."""
        block, triangle = torch.linalg.qr(gaussian_block(rows, seed, device))
        return cls(block, triangle, OVERLAP)

    def rounded(self, dtype: torch.dtype) -> "Start":
        """Allow for what rounding Q₁ takes from the overlap: at most 4·eps/2 in norm, times ‖R‖."""
        loss = 2 * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(self.triangle))
        return Start(self.block, self.triangle, self.overlap - loss)

    def of_length(self, square: float) -> "Start":
        """Allow for ‖uᵀ[Q₁ … Q_{k+1}]‖² up to ``square``, where a recurrence in lower precision is not orthonormal."""
        return Start(self.block, self.triangle, self.overlap / math.sqrt(square))
