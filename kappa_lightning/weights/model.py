"""The weight matrices of a module."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.quantised import dequantise, is_quantised, logical_shape
from kappa_lightning.weights.weight import (
    View,
    Weight,
    as_convolution,
    as_matrix,
    as_transposed_convolution,
    is_matrix_shape,
    view_of,
)

_NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRIX_LAYERS = (nn.Linear, nn.Embedding, nn.EmbeddingBag, _ConvNd)


def find_weights(module: nn.Module) -> list[Weight]:
    """All matrices of a module, tied ones once under their first name, in the order of ``named_parameters()``.

    A parametrised weight (``torch.nn.utils.parametrize``) is read as the layer uses it, under the name of the
    parameter that it is made from.

    Args:
        module: any module; a parameter counts whether or not it requires a gradient.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(weight.name, tuple(weight.matrices().shape)) for weight in find_weights(net)]
        [('0.weight', (1, 8, 75)), ('3.weight', (1, 2, 8))]
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    return list(_weights(module, layers))


def _weights(module: nn.Module, layers: dict[str, nn.Module]) -> Iterator[Weight]:
    for stored_name, parameter in module.named_parameters():
        name, (owner, _, attribute) = plain_name(stored_name), stored_name.rpartition(".")
        layer = layers[owner]
        if isinstance(layer, ParametrizationList):
            weight = _parametrised(name, parameter, layer, layers, owner)
            if weight is not None:
                yield weight
        elif _is_matrix(name, parameter, layer):
            shape = () if isinstance(parameter, UninitializedParameter) else logical_shape(parameter)
            read = partial(_read, name, parameter, layer)
            yield Weight(name, shape, parameter.dtype, read, _view(layer, attribute, shape), parameter)


def _parametrised(
    name: str, parameter: nn.Parameter, stored: ParametrizationList, layers: dict[str, nn.Module], owner: str
) -> Weight | None:
    """The weight that a parametrisation makes, under the name of its (largest) original; ``None`` for the others."""
    layer_name, _, attribute = owner.rpartition("parametrizations.")
    layer = layers[layer_name.rstrip(".")]
    originals = list(stored.parameters(recurse=False))
    if parameter is not max(originals, key=lambda p: p.numel()):
        return None

    def read() -> Tensor:
        # In training mode some parametrisations, such as spectral normalisation, change their buffers when read.
        modes = {submodule: submodule.training for submodule in stored.modules()}
        stored.eval()
        try:
            with torch.no_grad():
                return getattr(layer, attribute).detach()  # type: ignore[no-any-return]
        finally:
            for submodule, training in modes.items():
                submodule.training = training

    if parameter.is_meta:
        raise ValueError(_META.format(name=name))
    effective = read()
    if not _is_matrix(f"{layer_name}{attribute}", effective, layer):
        return None
    shape = tuple(effective.shape)
    return Weight(name, shape, effective.dtype, read, _view(layer, attribute, shape), parameter)


_META = "{name} is on the meta device and has no values: load the model's weights first"


def _read(name: str, parameter: nn.Parameter, layer: nn.Module) -> Tensor:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"{name} belongs to a lazy layer and has no shape yet: run a batch through it first")
    if parameter.is_meta:
        raise ValueError(_META.format(name=name))
    if is_quantised(parameter):
        return dequantise(name, parameter, layer)
    return parameter.detach()


def _is_matrix(name: str, weight: Tensor, layer: nn.Module) -> bool:
    if isinstance(weight, UninitializedParameter):
        return isinstance(layer, _MATRIX_LAYERS) and name.endswith("weight")
    if isinstance(layer, _NORMALISATION):
        return False
    if isinstance(layer, _MATRIX_LAYERS) and weight.ndim >= 2 and not name.endswith("bias"):
        return True
    return is_matrix_shape(name, tuple(weight.shape))


def _view(layer: nn.Module, attribute: str, shape: tuple[int, ...]) -> View:
    if isinstance(layer, _ConvTransposeNd) and attribute == "weight":
        return partial(as_transposed_convolution, groups=layer.groups)
    if isinstance(layer, _ConvNd):
        return as_convolution
    return view_of(shape) if len(shape) > 1 else as_matrix
