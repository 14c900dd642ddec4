"""What a rung of the ladder hands back: the ends of a spectrum, in the scale in which it was computed."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Values:
    """Spectral values of a stack of scaled matrices, float64, each of shape (count,).

    Attributes:
        sigma_max: largest singular value.
        sigma_min: smallest of the min(rows, cols) singular values; 0 where numerically rank-deficient.
        log_volume: Σ ln σ_i in nats; −inf where rank-deficient.
        frobenius_norm: √Σ σ_i².
        rtol: shown relative error of σ_max / σ_min; inf where nothing was shown, 0 where rank-deficient.
    """

    sigma_max: Tensor
    sigma_min: Tensor
    log_volume: Tensor
    frobenius_norm: Tensor
    rtol: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "Values":
        """Return values of zero matrices, in which a rung's results can be written."""
        zero = torch.zeros(count, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero - torch.inf, zero.clone(), zero.clone())

    def write(self, members: "Tensor | slice", values: "Values") -> None:
        """Overwrite the given members in place."""
        for field in fields(self):
            getattr(self, field.name)[members] = getattr(values, field.name)

    def with_rank(self, deficient: Tensor) -> "Values":
        """Return the values with σ_min = 0 and log-volume −inf for the members found rank-deficient."""
        return Values(
            self.sigma_max,
            self.sigma_min.masked_fill(deficient, 0.0),
            self.log_volume.masked_fill(deficient, -torch.inf),
            self.frobenius_norm,
            self.rtol.masked_fill(deficient, 0.0),
        )
