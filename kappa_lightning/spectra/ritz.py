"""Ritz values of a matrix itself in a few directions that a rounded factor has proposed."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PROBED = 8
"""Directions at each end of a spectrum: with several, the nearest neighbors of an extreme value do no harm."""


def extreme_ritz_values(
    row_blocks: Callable[[], Iterable[Tensor]], top: Tensor, bottom: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Take max and min of ‖Av‖ over unit vectors v of two small subspaces (Rayleigh and Ritz), in float64.

    They lie inside A's spectrum whatever the subspaces: max ‖Av‖ ≤ σ_max and σ_min ≤ min ‖Av‖. With subspaces from a
    factor whose squared singular values are those of A up to a factor 1 ± f
    (:func:`~kappa_lightning.spectra.backward_error.compare`), they are off by f² over the relative gap to the
    first singular value outside, where those of the factor are off by f.

    Args:
        row_blocks: reads the A's from top to bottom, in float64, each block of shape (count, some rows, n).
        top: rows that span the one subspace, shape (count, few, n), float64; they need not be orthonormal.
        bottom: rows that span the other.

    Returns:
        σ_max and σ_min, each of shape (count,), NaN where a direction was.
    """
    directions = torch.cat([torch.linalg.qr(rows.nan_to_num().mT).Q.mT for rows in (top, bottom)], dim=-2)
    few = top.shape[-2]
    gram = torch.zeros(len(top), 2 * few, 2 * few, dtype=torch.float64, device=top.device)
    for part in row_blocks():
        image = directions @ part.mT
        gram.baddbmm_(image, image.mT)
    largest = torch.linalg.eigvalsh(gram[..., :few, :few])[..., -1]
    smallest = torch.linalg.eigvalsh(gram[..., few:, few:])[..., 0]
    sound = top.isfinite().all((-2, -1)) & bottom.isfinite().all((-2, -1))
    return largest.sqrt().where(sound, torch.nan), smallest.sqrt().where(sound, torch.nan)
