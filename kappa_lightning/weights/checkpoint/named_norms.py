"""Weights that several tensors of a checkpoint make, as the names tell that PyTorch gives them.

What a layer under weight normalization, spectral normalization or pruning uses is not stored, but made from what is,
and the names (``weight_g`` and ``weight_v``, ``weight_orig`` and ``weight_mask``, …) are PyTorch's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kappa_lightning.weights.checkpoint.stored import Stored
from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.weight import View, Weight, as_convolution, as_transposed_convolution, view_of

_ORIGINAL = re.compile(r"(?P<around>.*parametrizations\.\w+\.)original(?P<number>1?)$")


def made_weight(name: str, tensors: Mapping[str, Stored]) -> Weight | None:
    """The weight that goes by the name of this tensor and is made from it and others; ``None`` if there is none."""
    found = _ORIGINAL.fullmatch(name)
    if found:
        around = found["around"]
        if found["number"]:
            return _weight_norm(name, f"{around}original0", tensors)
        return _spectral_norm(name, f"{around}0._u", f"{around}0._v", tensors)
    if name.endswith("_v"):
        return _weight_norm(name, f"{name[:-2]}_g", tensors)
    stem = name.removesuffix("_orig")
    if stem != name:
        return _pruned(name, f"{stem}_mask", tensors) or _spectral_norm(name, f"{stem}_u", f"{stem}_v", tensors)
    return None


def _weight_norm(direction: str, length: str, tensors: Mapping[str, Stored]) -> Weight | None:
    v, g = _readable(tensors, direction, length)
    if v is None or g is None or len(g.shape) != len(v.shape):
        return None
    kept = [dim for dim, size in enumerate(g.shape) if size > 1]
    if len(kept) > 1 or any(g.shape[dim] != v.shape[dim] for dim in kept):
        return None
    dim = kept[0] if kept else 0

    def make(v: Tensor, g: Tensor) -> Tensor:
        return torch._weight_norm(v, g, dim)

    return _of(v, (g,), make)


def _spectral_norm(original: str, left: str, right: str, tensors: Mapping[str, Stored]) -> Weight | None:
    weight, u, v = _readable(tensors, original, left, right)
    if weight is None or u is None or v is None or len(u.shape) != 1 or len(v.shape) != 1:
        return None
    total = u.shape[0] * v.shape[0]
    # The dimension of the outputs, which of a transposed convolution is the second one.
    dims = [dim for dim, size in enumerate(weight.shape) if size == u.shape[0]]
    if torch.Size(weight.shape).numel() != total or not dims:
        return None
    dim = dims[0]

    def make(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        rows = weight.permute(dim, *(other for other in range(weight.ndim) if other != dim)).flatten(1)
        return weight / torch.dot(u, torch.mv(rows, v))

    transposed = dim == 1 and len(weight.shape) > 2
    return _of(weight, (u, v), make, partial(as_transposed_convolution, groups=1) if transposed else None)


def _pruned(original: str, mask: str, tensors: Mapping[str, Stored]) -> Weight | None:
    weight, kept = _readable(tensors, original, mask)
    if weight is None or kept is None or weight.shape != kept.shape:
        return None

    def make(weight: Tensor, mask: Tensor) -> Tensor:
        return mask.to(weight.dtype) * weight

    return _of(weight, (kept,), make)


def _readable(tensors: Mapping[str, Stored], leading: str, *names: str) -> list[Stored | None]:
    """The tensors of these names; of the first, only if it may be a matrix."""
    first = tensors[leading]
    found = [tensors.get(name) for name in names]
    if first.refusal or not first.has_values or len(first.shape) < 2:
        return [None, *found]
    return [first, *(None if tensor is None or tensor.refusal else tensor for tensor in found)]


def _of(leading: Stored, others: tuple[Stored, ...], make: Callable[..., Tensor], view: View | None = None) -> Weight:
    def read() -> Tensor:
        # Cloned, since sums over what a file maps, at any address, are rounded in another order than the model's.
        with torch.no_grad():
            return make(leading.read().clone(), *(other.read().clone() for other in others))

    # What is normalized or pruned is a layer's weight: of three dimensions, a convolution's.
    view = view or (as_convolution if len(leading.shape) > 2 else view_of(leading.shape))
    companions = tuple(plain_name(other.name) for other in others)
    dtype = leading.dtype or torch.float32

    def sources() -> tuple[Tensor, ...]:
        return tuple(stored.read() for stored in (leading, *others))

    return Weight(plain_name(leading.name), leading.shape, dtype, read, view, None, companions, sources=sources)
