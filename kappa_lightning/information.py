"""The entropy quantities behind the condition number: what a weight matrix lets through of a Gaussian input.

Differential entropies are in nats and compare only between outputs of the same dimension. Reference: Ludwig, "The
Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units", arXiv 2506.16289; the equations
are those of Cover and Thomas, "Elements of Information Theory", chapter 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LogSlope = Callable[[Tensor], Tensor]
_EPS: float = torch.finfo(torch.float64).eps


class ImageEntropy(NamedTuple):
    """The differential entropy of y = W·x on the image of W.

    Attributes:
        nats: h(y) with respect to the ``rank``-dimensional Hausdorff measure (length, area, volume) on the image.
        rank: the dimension of the image of the input's covariance under W.
    """

    nats: float
    rank: int


def gaussian_output_entropy(weight: Tensor, covariance: Tensor | None = None) -> ImageEntropy:
    """Differential entropy of y = W·x for Gaussian x.

    If W·Σ·Wᵀ has full rank, h(y) = ½ ln det(2πe·W·Σ·Wᵀ) (Cover and Thomas, theorem 8.4.1). In general y lies in a
    subspace of dimension r, where h(y) = (r/2) ln(2πe) + Σ_{i≤r} ln σ_i(W·Σ^½) with the r nonzero singular values. That
    is the entropy of y in an orthonormal basis of the subspace: in more than r dimensions y has no density, and h would
    be −∞. A wide W of full rank has r = rows; a tall one has r = cols and Σ ln σ_i(W) = ½ ln det(WᵀW).

    Args:
        weight: W, shape (rows, cols), any real floating dtype; computed in float64.
        covariance: Σ of the input, shape (cols, cols), symmetric and positive semidefinite; the identity if ``None``.

    Returns:
        The entropy and r; singular values up to max(rows, cols)·eps·σ_max count as zero, eps being float64's as in
        :func:`~kappa_lightning.spectrum`. A zero matrix gives (0, 0).

    Raises:
        ValueError: if a shape is wrong, an entry is not finite, or the covariance is not symmetric and positive
            semidefinite.

    Example:
        Three inputs, of which the second output is twice the first: one dimension is left.

        >>> import torch
        >>> entropy = gaussian_output_entropy(torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]))
        >>> entropy.rank, round(entropy.nats, 4) == round(0.5 * math.log(2 * math.pi * math.e * 5), 4)
        (1, True)
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give one matrix (rows, cols)")
    matrix = weight.detach().to(torch.float64)
    if not matrix.isfinite().all():
        raise ValueError("weight has entries that are NaN or infinite, so its output has no entropy")
    if covariance is not None:
        matrix = matrix @ _square_root(covariance.detach().to(matrix), weight.shape[1])
    sigma = torch.linalg.svdvals(matrix)
    sigma = sigma[sigma > max(weight.shape) * _EPS * sigma[0]]
    rank = len(sigma)
    return ImageEntropy(isotropic_output_entropy(float(sigma.log().sum()), rank), rank)


def _square_root(covariance: Tensor, size: int) -> Tensor:
    if covariance.shape != (size, size):
        raise ValueError(f"covariance has shape {tuple(covariance.shape)}: weight takes inputs of {size} dimensions")
    if not covariance.isfinite().all() or not torch.allclose(covariance, covariance.T):
        raise ValueError("covariance is not finite and symmetric")
    values, vectors = torch.linalg.eigh(covariance)
    smallest, largest = float(values[0]), float(values[-1])
    noise = size * _EPS * max(abs(smallest), abs(largest))
    if smallest < -noise:
        raise ValueError(f"covariance has the negative eigenvalue {smallest:.3g}: it is not positive semidefinite")
    # The root of an eigenvalue that is rounding error would be far above it, and count.
    roots = torch.where(values > noise, values, 0.0).sqrt()
    scaled: Tensor = vectors * roots
    return scaled


def isotropic_output_entropy(log_volume: float, rank: int, scale: float = 1.0) -> float:
    """Differential entropy of y = W·x for x ~ N(0, scale²·I), from log-volume alone, in nats.

    h(y) = (r/2) ln(2πe·scale²) + Σ_{i≤r} ln σ_i, on the r-dimensional image of W (see
    :func:`gaussian_output_entropy`).

    Args:
        log_volume: Σ ln σ_i over the r nonzero singular values, as :class:`~kappa_lightning.Spectrum` has it for a
            matrix of full rank r = min(rows, cols), in nats.
        rank: r.
        scale: standard deviation of each input.

    Raises:
        ValueError: if the rank is negative or the scale is not positive.

    Example:
        Halving a 3×3 matrix costs 3 ln 2 nats.

        >>> full = isotropic_output_entropy(0.0, rank=3)
        >>> half = isotropic_output_entropy(3 * math.log(0.5), rank=3)
        >>> round((full - half) / math.log(2), 6)
        3.0
    """
    if rank < 0 or not scale > 0:
        raise ValueError(f"rank={rank}, scale={scale}: give a rank of at least 0 and a positive scale")
    return 0.5 * rank * math.log(2 * math.pi * math.e * scale**2) + log_volume


def entropy_deficit(log_volume: float, frobenius_norm: float, rank: int) -> float:
    """What unequal singular values cost the output's entropy at a fixed norm, in nats per dimension.

    ½ ln(‖W‖_F²/r) − (1/r) Σ_{i≤r} ln σ_i ≥ 0, by Jensen's inequality (the logarithm of the arithmetic mean of the σ_i²
    less the mean of their logarithms, halved). It is zero if and only if all σ_i are equal, that is κ = 1, and does
    not change when W is multiplied by a number. Among all W of rank r and one Frobenius norm, r times this is how far
    h(W·x) stays below its maximum for isotropic Gaussian x. The paper argues with κ; it bounds the deficit by ln κ from
    above, since every ln σ_i lies in an interval of that length, and κ = ∞ alone makes it infinite.

    Args:
        log_volume: Σ ln σ_i over the r nonzero singular values, in nats.
        frobenius_norm: √Σ σ_i².
        rank: r. With r = min(rows, cols) and a log-volume of −∞, the deficit of a rank-deficient matrix is ∞.

    Raises:
        ValueError: if the rank is below 1.

    Example:
        Singular values 2 and ½ (norm √4.25), and 1 and 1:

        >>> [round(entropy_deficit(0.0, norm, rank=2), 4) for norm in (math.sqrt(4.25), math.sqrt(2))]
        [0.3769, 0.0]
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: the deficit is one per dimension, and there is none")
    if log_volume == -math.inf:
        return math.inf
    return max(0.0, math.log(frobenius_norm) - 0.5 * math.log(rank) - log_volume / rank)


def contraction(log_slope: LogSlope, scales: Tensor) -> float:
    """What an element-wise contractive nonlinearity f takes from the entropy of y, in nats: never more than zero.

    h(f(y)) = h(y) + Σ_i E[ln |f'(y_i)|] ≤ h(y) if |f'| ≤ 1, for every y with a density (Cover and Thomas, equation
    8.71, with the Jacobian diag(f'(y_i))). Only the marginals of y matter, here N(0, scale_i²). Needed are

    - a density of y, that is W of full row rank. On an image of lower dimension r the change is E[ln √det(UᵀD²U)] with
      D = diag(f'(y_i)) and U an orthonormal basis: not what is computed here, but not more than zero either.
    - an f that is strictly monotone and differentiable almost everywhere: tanh, sigmoid, softplus, leaky ReLU. ReLU is
      flat on half the line; its output has atoms and no density, and h(f(y)) = −∞, so the bound holds and says nothing.
      GELU and SiLU are neither monotone nor of slope ≤ 1, and the bound does not hold for them.

    Args:
        log_slope: ln |f'(y)|, element-wise, on float64 tensors; :func:`log_slope_tanh`, :func:`log_slope_sigmoid`, or
            :func:`log_slope_leaky_relu` of a slope. A function of ln rather than of f', which underflows.
        scales: standard deviations of y_i, shape (dim,): the roots of the diagonal of W·Σ·Wᵀ.

    Returns:
        Σ_i E[ln |f'(y_i)|] by the midpoint rule on 4096 points over ±12 standard deviations.

    Raises:
        ValueError: if a scale is not positive, or the slope exceeds 1 at one of those points.

    Example:
        A leaky ReLU costs half of −ln of its slope a dimension, whatever the scale.

        >>> import torch
        >>> change = contraction(log_slope_leaky_relu(0.01), torch.tensor([0.3, 1.0, 5.0]))
        >>> round(change, 6) == round(3 * math.log(0.01) / 2, 6)
        True
    """
    if scales.ndim != 1 or not bool((scales > 0).all()) or not scales.isfinite().all():
        raise ValueError(f"scales={scales} must be positive and finite, of shape (dim,)")
    # An even number of points, so that none is at zero, where many slopes jump.
    points, reach = 4096, 12.0
    step = 2 * reach / points
    standard = (torch.arange(points, dtype=torch.float64, device="cpu") + 0.5) * step - reach
    weights = torch.exp(-(standard**2) / 2) * step / math.sqrt(2 * math.pi)
    total = 0.0
    for scale in scales.tolist():
        slopes = log_slope(scale * standard)
        if bool((slopes > 1e-12).any()):
            raise ValueError(f"the slope reaches {float(slopes.max().exp()):.4g}: the nonlinearity is not contractive")
        total += float(weights @ slopes)
    return total


def log_slope_tanh(y: Tensor) -> Tensor:
    """ln tanh'(y) = 2 ln 2 − 2|y| − 2 ln(1 + e^(−2|y|)), element-wise."""
    size = y.abs()
    return 2 * (math.log(2) - size - functional.softplus(-2 * size))


def log_slope_sigmoid(y: Tensor) -> Tensor:
    """ln of the slope of 1/(1 + e^(−y)), −|y| − 2 ln(1 + e^(−|y|)), element-wise; −ln 4 at most."""
    size = y.abs()
    return -size - 2 * functional.softplus(-size)


def log_slope_leaky_relu(negative_slope: float) -> LogSlope:
    """ln |f'| of a leaky ReLU: 0 above zero and ln(negative_slope) below.

    Under any y_i with median zero its mean is ln(negative_slope)/2.

    Raises:
        ValueError: if the slope is not in (0, 1]; with 0 it is a ReLU, whose output has no density.
    """
    if not 0 < negative_slope <= 1:
        raise ValueError(f"negative_slope={negative_slope} must be in (0, 1]: a ReLU's output has no density")
    below = math.log(negative_slope)
    return lambda y: below * (y < 0).to(y.dtype)
