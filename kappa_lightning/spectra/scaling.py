"""Matrices brought to one orientation and one scale, read in float64 or float32 a few rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TallMatrices:
    """A stack of matrices with rows ≥ cols, each to be read as 2^−exponent times its entries.

    The power of two puts the largest |entry| into [1/2, 1) and is exact, so the scale of a weight cannot change its κ.

    Attributes:
        entries: shape (count, rows, cols), any real floating dtype; a view of the caller's tensor where possible.
        exponent: shape (count,), int32.
    """

    entries: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, stack: Tensor, largest: Tensor) -> "TallMatrices":
        """Orient a (count, rows, cols) stack whose largest absolute entries, float64 of shape (count,), are known."""
        tall = stack if stack.shape[-2] >= stack.shape[-1] else stack.mT
        return cls(tall, torch.frexp(largest).exponent)

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.entries.shape[0]

    @property
    def rows(self) -> int:
        """The larger dimension."""
        return self.entries.shape[-2]

    @property
    def cols(self) -> int:
        """The smaller dimension, and so the number of singular values."""
        return self.entries.shape[-1]

    def take(self, members: Tensor | slice) -> "TallMatrices":
        """Select matrices by a slice (a view) or by an index tensor (a copy)."""
        return TallMatrices(self.entries[members], self.exponent[members])

    def scaled(self, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows first:last of the scaled matrices, a new tensor of shape (count, last − first, cols)."""
        # The product promotes to float64, where 2^−exponent is a number even for a subnormal float32 matrix; for a
        # float64 matrix it need not be one, so it comes in two factors.
        half = self.exponent // 2 if self.entries.dtype == torch.float64 else torch.zeros_like(self.exponent)
        part = self.entries[:, first:last] * _power_of_two(half - self.exponent)[:, None, None]
        if self.entries.dtype == torch.float64:
            part.mul_(_power_of_two(-half)[:, None, None])
        return part.to(dtype)

    def row_blocks(self, dtype: torch.dtype, rows: int) -> Iterator[Tensor]:
        """Yield the scaled matrices from top to bottom, at most ``rows`` rows at a time."""
        for first in range(0, self.rows, rows):
            yield self.scaled(dtype, first, first + rows)

    def unscale(self, values: Tensor) -> Tensor:
        """Scale singular values or norms of shape (count,) back to those of the caller's matrices."""
        half = self.exponent // 2
        return values * _power_of_two(half) * _power_of_two(self.exponent - half)

    def unscale_log_volume(self, log_volume: Tensor) -> Tensor:
        """Scale Σ ln σ of shape (count,) back to that of the caller's matrices."""
        return log_volume + self.cols * math.log(2.0) * self.exponent


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact on every device, for −1022 ≤ exponent ≤ 1023 (torch.ldexp goes through float32)."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
