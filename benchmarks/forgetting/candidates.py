"""Criteria that were tried beside those of the package; importing this module registers them.

Each needs only the weights. The lowest score trains first, and ``reversed:`` turns a criterion round.
"""

from __future__ import annotations

import math

from kappa_lightning.selection import Matrix, Scorable, per_matrix, register_criterion
from kappa_lightning.weights.roles import depth_and_role


@register_criterion("rms")
@per_matrix
def rms(matrix: Matrix) -> float:
    """The root mean square of the entries, so that the quietest matrices train first."""
    rows, cols = matrix.shape
    return matrix.frobenius_norm / math.sqrt(rows * cols)


@register_criterion("sigma_max")
@per_matrix
def sigma_max(matrix: Matrix) -> float:
    """The largest singular value."""
    return matrix.sigma_max


@register_criterion("kappa_norm")
@per_matrix
def kappa_norm(matrix: Matrix) -> float:
    """κ·‖W‖_F: what is near a multiple of an orthogonal matrix, and short, first."""
    return matrix.kappa * matrix.frobenius_norm


@register_criterion("mean_log_sigma")
@per_matrix
def mean_log_sigma(matrix: Matrix) -> float:
    """The mean of ln σ_i, the log-volume per dimension."""
    return matrix.log_volume / min(matrix.shape)


@register_criterion("aspect")
def aspect(row: Scorable) -> float:
    """Short side over long side of the matrices: what κ mostly is before training, and nothing of the values."""
    rows, cols = row.matrices[0].shape
    return min(rows, cols) / max(rows, cols)


@register_criterion("fan_out")
def fan_out(row: Scorable) -> float:
    """Rows over columns: 4 for what widens, 1/4 for what narrows; nothing of the values."""
    rows, cols = row.matrices[0].shape
    return rows / cols


@register_criterion("kappa_without_embeddings")
def kappa_without_embeddings(row: Scorable) -> float:
    """κ, with the embeddings last: a row of theirs belongs to a token, whatever is read from it."""
    return math.inf if "embed" in row.name else row.kappa


@register_criterion("depth")
def depth(row: Scorable) -> float:
    """The layer's index, −1 for what has none: the first layers train first."""
    index, _ = depth_and_role(row.name)
    return -1.0 if index is None else float(index)
