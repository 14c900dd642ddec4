"""What a layer says of its parameters: which of them are matrices, and how each is viewed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.parameter import UninitializedParameter

from kappa_lightning.weights.weight import (
    View,
    as_convolution,
    as_matrix,
    as_transposed_convolution,
    is_matrix_shape,
    view_of,
)

_NORMALIZATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRIX_LAYERS = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, _ConvNd)
# What a scripted layer of a class of somebody's own still has of the class that it is made from.
_KEPT = {
    ("in_channels", "kernel_size", "groups"): _ConvNd,
    ("in_features", "out_features"): nn.Linear,
    ("num_embeddings", "embedding_dim"): nn.Embedding,
    ("normalized_shape", "eps"): nn.LayerNorm,
    ("num_features", "eps"): _NormBase,
    ("num_groups", "num_channels"): nn.GroupNorm,
}


def class_of(layer: nn.Module) -> type:
    """The class of a layer; of a scripted or traced one, the class of PyTorch that it was.

    Example:
        >>> class_of(torch.jit.script(nn.Conv1d(2, 3, 1))).__name__
        'Conv1d'
    """
    if not isinstance(layer, torch.jit.ScriptModule):
        return type(layer)
    known = getattr(nn, str(layer.original_name), None)
    if isinstance(known, type):
        return known
    for attributes, kind in _KEPT.items():
        if all(hasattr(layer, attribute) for attribute in attributes):
            return _ConvTransposeNd if getattr(layer, "transposed", False) else kind
    return type(layer)


def is_matrix(attribute: str, weight: Tensor, layer: nn.Module) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices.

    The weights of layers that multiply by them are, whatever their size (a projection to one channel, an input of one
    column); those of normalization layers are not; of anything else the shape decides.
    """
    kind = class_of(layer)
    if isinstance(weight, UninitializedParameter):
        return issubclass(kind, _MATRIX_LAYERS) and attribute == "weight"
    if weight.numel() == 0:
        return False  # it has no singular values
    if issubclass(kind, _MATRIX_LAYERS) and attribute == "weight":
        return weight.ndim >= 2
    if issubclass(kind, _NORMALIZATION):
        return False
    if issubclass(kind, nn.RNNBase | RNNCellBase | nn.MultiheadAttention) and "weight" in attribute:
        return weight.ndim == 2
    if attribute == "weight" and weight.ndim == 2:
        return "norm" not in kind.__name__.lower()  # a projection of a class of its own, such as a router
    return is_matrix_shape(attribute, tuple(weight.shape))


def view_for(layer: nn.Module, attribute: str, shape: tuple[int, ...]) -> View:
    """How a layer's parameter is viewed as matrices."""
    kind = class_of(layer)
    if issubclass(kind, _ConvTransposeNd) and attribute == "weight":
        return partial(as_transposed_convolution, groups=_groups(layer))
    if issubclass(kind, _ConvNd):
        return as_convolution
    return view_of(shape) if len(shape) > 1 else as_matrix


def _groups(layer: nn.Module) -> int:
    if not hasattr(layer, "groups"):
        # A traced layer keeps its parameters, and everything else only as constants of its graph.
        call = layer.graph.findNode("aten::_convolution")  # type: ignore[operator, union-attr]
        return int(list(call.inputs())[8].toIValue())
    return int(layer.groups)  # type: ignore[arg-type]
