"""The update of a matrix without its small singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from kappa_lightning.weights.weight import View


class FilteredUpdate:
    """An update whose singular values below a share of the largest are dropped.

    At the factor α those below (1 − α)·σ_max are dropped: 1 keeps the whole update, and nothing is left at 0. What
    training added in many small directions goes first, which are those that carry least of the new task (arXiv
    2605.20296 thresholds the update in this way after training).

    Args:
        update: trained weight minus pretrained weight, of any layout.
        view: turns the layout into matrices, shape (count, rows, cols).
        device: where the decomposition is computed; the bases lie on the CPU, count · min(rows, cols)² numbers.

    Example:
        >>> import torch
        >>> from kappa_lightning.weights.weight import as_matrix
        >>> update = FilteredUpdate(torch.diag(torch.tensor([4.0, 3.0, 1.0])), as_matrix, torch.device("cpu"))
        >>> update.at(0.5).diagonal().round().tolist()
        [4.0, 3.0, 0.0]
    """

    def __init__(self, update: Tensor, view: View, device: torch.device) -> None:
        self.update = update
        # Where each entry of the matrices lies in the stored layout, whatever the view does.
        self.index = view(torch.arange(update.numel()).view(update.shape))
        self.basis, self.sigma, self.on_the_left = decompose(self._matrices().to(device))

    def at(self, factor: float) -> Tensor:
        """The update at a factor in [0, 1], in its own layout, on the CPU."""
        filtered = truncated(self._matrices(), self.basis, self.sigma, self.on_the_left, factor)
        result = torch.empty_like(self.update).flatten()
        result[self.index.flatten()] = filtered.to(result.dtype).flatten()
        return result.view(self.update.shape)

    def _matrices(self) -> Tensor:
        return self.update.flatten()[self.index]


def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The singular vectors of the shorter side and the singular values of a batch of matrices, on the CPU.

    Args:
        matrices: shape (count, rows, cols).

    Returns:
        Vectors of shape (count, k, k) and values of shape (count, k), k = min(rows, cols), and whether the vectors
        are the left ones.
    """
    on_the_left = matrices.shape[-2] <= matrices.shape[-1]
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u if on_the_left else vh.mT).cpu(), sigma.cpu(), on_the_left


def truncated(matrices: Tensor, basis: Tensor, sigma: Tensor, on_the_left: bool, factor: float) -> Tensor:
    """Matrices without their singular values below (1 − factor)·σ_max; see :func:`decompose`."""
    keep = sigma >= (1 - factor) * sigma.amax(-1, keepdim=True)
    if factor == 0:
        keep = torch.zeros_like(keep)
    kept = basis * keep[:, None, :].to(basis.dtype)
    return kept @ (basis.mT @ matrices) if on_the_left else (matrices @ kept) @ basis.mT
