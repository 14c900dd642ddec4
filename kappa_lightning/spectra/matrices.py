"""Matrices brought to one orientation and one scale, read in float64 or float32 a few rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Powers of two up to here, and their inverses, are float32 numbers with room to spare.
_MODERATE_EXPONENT = 60
# Up to here sums of squares, and products of two of them, are, too, so that nothing need be scaled.
_HARMLESS_EXPONENT = 16


@dataclass(frozen=True, slots=True)
class TallMatrices:
    """A stack of matrices with rows ≥ cols, each to be read as 2^−exponent times its entries.

    The power of two puts the largest |entry| into [1/2, 1), unless it is between 1e-5 and 1e4 anyway, and is exact, so
    the scale of a weight cannot change its κ.

    Attributes:
        entries: shape (count, rows, cols), any real floating dtype; a view of the caller's tensor where possible.
        exponent: shape (count,), int32.
        is_scaled: whether any exponent is not 0.
    """

    entries: Tensor
    exponent: Tensor
    is_scaled: bool

    @classmethod
    def of(cls, stack: Tensor, largest: Tensor) -> "TallMatrices":
        """Orient a (count, rows, cols) stack whose largest absolute entries, float64 of shape (count,), are known.

        A square matrix is transposed as well: LAPACK wants columns contiguous, and those of the transpose usually are.
        """
        tall = stack if stack.shape[-2] > stack.shape[-1] else stack.mT
        exponent = torch.frexp(largest).exponent
        exponent = exponent.masked_fill(exponent.abs() <= _HARMLESS_EXPONENT, 0)
        return cls(tall, exponent, bool(exponent.any()))

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
        return TallMatrices(self.entries[members], self.exponent[members], self.is_scaled)

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """Return the scaled matrices, a new tensor of shape (count, rows, cols) in the memory order of ``entries``."""
        whole = next(self.row_blocks(dtype, self.rows))
        return whole if whole.data_ptr() != self.entries.data_ptr() else whole.clone()

    def row_blocks(self, dtype: torch.dtype, rows: int) -> Iterator[Tensor]:
        """Yield the scaled matrices from top to bottom, at most ``rows`` rows at a time.

        Every block is written over the one before: fresh memory costs more than the conversion. Where nothing needs
        converting they are the caller's own entries, and must not be changed.
        """
        if dtype == self.entries.dtype and not self.is_scaled:
            for first in range(0, self.rows, rows):
                yield self.entries[:, first : first + rows]
            return
        if dtype == torch.float32 and self.entries.dtype != torch.float64 and self._scales_in_float32():
            yield from self._rounded_row_blocks(rows)
            return
        # In float64 2^−exponent is a number even for a subnormal float32 matrix; for a float64 matrix it need not be
        # one, so it comes in two factors.
        half = self.exponent // 2 if self.entries.dtype == torch.float64 else torch.zeros_like(self.exponent)
        scale, rest = _power_of_two(half - self.exponent)[:, None, None], _power_of_two(-half)[:, None, None]
        block = torch.empty_like(self.entries[:, :rows], dtype=torch.float64)
        rounded = block if dtype == torch.float64 else torch.empty_like(block, dtype=dtype)
        for first in range(0, self.rows, rows):
            source = self.entries[:, first : first + rows]
            part = block[:, : source.shape[-2]].copy_(source)
            if self.is_scaled:
                # Not one mixed product: the CPU would first convert into a temporary.
                part.mul_(scale)
            if self.is_scaled and self.entries.dtype == torch.float64:
                part.mul_(rest)
            yield part if rounded is block else rounded[:, : source.shape[-2]].copy_(part)

    def _scales_in_float32(self) -> bool:
        return bool((self.exponent.abs() <= _MODERATE_EXPONENT).all())

    def _rounded_row_blocks(self, rows: int) -> Iterator[Tensor]:
        """Yield the blocks of :meth:`row_blocks` in float32, half the memory traffic, where no scale overflows it."""
        scale = _power_of_two(-self.exponent).to(torch.float32)[:, None, None]
        block = torch.empty_like(self.entries[:, :rows], dtype=torch.float32)
        for first in range(0, self.rows, rows):
            source = self.entries[:, first : first + rows]
            part = block[:, : source.shape[-2]].copy_(source)
            yield part.mul_(scale) if self.is_scaled else part

    def unscale(self, values: Tensor) -> Tensor:
        """Scale singular values or norms of shape (count,) back to those of the caller's matrices."""
        half = self.exponent // 2
        return values * _power_of_two(half) * _power_of_two(self.exponent - half)

    def unscale_log_volume(self, log_volume: Tensor) -> Tensor:
        """Scale Σ ln σ of shape (count,) back to that of the caller's matrices."""
        return log_volume + self.cols * math.log(2.0) * self.exponent.to(torch.float64)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact on every device, for −1022 ≤ exponent ≤ 1023 (torch.ldexp goes through float32)."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
