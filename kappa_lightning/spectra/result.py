"""The spectral values of a batch of matrices: what a rung of the ladder hands back, and what the caller gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The ends and the sums of the singular values of a batch of matrices; float64 tensors of the batch's shape.

    Two of them are equal if all their values are, to the last bit, and lie on one device.

    Attributes:
        kappa: condition number σ_max / σ_min; inf for a numerically rank-deficient matrix, σ_min ≤ max(rows,
            cols)·eps·σ_max.
        sigma_max: largest singular value, in the unit of the entries.
        sigma_min: the smallest of the min(rows, cols) singular values; 0 when rank-deficient.
        log_volume: Σ ln σ_i over min(rows, cols) values, in nats; −inf when rank-deficient. Its error is at most rtol
            nats for each value, and that of float64 unless a float32 factor was enough for κ: then 4e-5 nats were
            seen for a 2000×1900 matrix.
        frobenius_norm: √Σ σ_i², in the unit of the entries.
        rtol: the relative error of κ that is guaranteed; 0 when rank-deficient. Above the request only where a float64
            decomposition cannot give it, that is for κ above about rtol / (√n·1e-15).
    """

    kappa: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    log_volume: Tensor
    frobenius_norm: Tensor
    rtol: Tensor

    @classmethod
    def of_ends(
        cls, sigma_max: Tensor, sigma_min: Tensor, log_volume: Tensor, frobenius_norm: Tensor, rtol: Tensor
    ) -> Spectrum:
        """Values with κ from the ends, all of one shape; a σ_min of 0 stands for a rank-deficient matrix."""
        # 0/0 of a zero matrix.
        kappa = torch.where(sigma_min > 0, sigma_max / sigma_min, torch.inf)
        return cls(kappa, sigma_max, sigma_min, log_volume, frobenius_norm, rtol)

    def __getitem__(self, index: Any) -> Spectrum:
        """The spectrum of one matrix, or of a slice, of the batch."""
        return Spectrum(*(value[index] for value in self._values()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        pairs = list(zip(self._values(), other._values(), strict=True))
        return all(mine.device == theirs.device and torch.equal(mine, theirs) for mine, theirs in pairs)

    __hash__ = None  # type: ignore[assignment]

    def reshaped(self, batch: torch.Size) -> Spectrum:
        """The same values in the shape of a batch."""
        return Spectrum(*(value.reshape(batch) for value in self._values()))

    def _values(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def zero_spectrum(count: int, device: torch.device) -> Spectrum:
    """Values of zero matrices, each of shape (count,), in which those of others can be written."""
    zero = torch.zeros(count, dtype=torch.float64, device=device)
    return Spectrum.of_ends(zero, zero.clone(), zero - torch.inf, zero.clone(), zero.clone())


def nothing_shown(like: Tensor) -> Spectrum:
    """Values of which nothing is known: inf, also their ``rtol``."""
    return Spectrum(*(torch.full_like(like, torch.inf) for _ in fields(Spectrum)))


def stacked(spectra: Sequence[Spectrum]) -> Spectrum:
    """The values of batches one after the other."""
    return Spectrum(*(torch.cat(values) for values in zip(*(one._values() for one in spectra), strict=True)))


def write(into: Spectrum, members: Tensor | slice, values: Spectrum) -> None:
    """Overwrite the values of some matrices in place."""
    for field in fields(Spectrum):
        getattr(into, field.name)[members] = getattr(values, field.name)


def with_rank(values: Spectrum, deficient: Tensor) -> Spectrum:
    """The values, with κ = inf, σ_min = 0 and log-volume −inf where a matrix was found rank-deficient."""
    return Spectrum(
        values.kappa.masked_fill(deficient, torch.inf),
        values.sigma_max,
        values.sigma_min.masked_fill(deficient, 0.0),
        values.log_volume.masked_fill(deficient, -torch.inf),
        values.frobenius_norm,
        values.rtol.masked_fill(deficient, 0.0),
    )
