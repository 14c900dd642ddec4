"""The weight matrices of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.quantized import dequantize, is_quantized, logical_shape
from kappa_lightning.weights.sharded import is_sharded, whole
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

    A parametrized weight (``torch.nn.utils.parametrize``) is read as the layer uses it, under the name of the
    parameter that it is made from. One that is sharded over processes is read whole, which they must do together.

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
        owner, _, attribute = stored_name.rpartition(".")
        layer = layers[owner]
        if isinstance(layer, ParametrizationList):
            made = _parametrized(owner, layer, layers)
        elif (hook := _weight_norm(layer, attribute)) is not None:
            made = _weight_normalized(owner, layer, hook)
        else:
            made = None
            if _is_matrix(attribute, parameter, layer):
                name = plain_name(stored_name)
                shape = () if isinstance(parameter, UninitializedParameter) else logical_shape(parameter)
                read = partial(_read, name, parameter, layer)
                yield Weight(name, shape, parameter.dtype, read, _view(layer, attribute, shape), parameter)
        if made is not None and made.parameter is parameter:
            yield made


def _parametrized(owner: str, stored: ParametrizationList, layers: dict[str, nn.Module]) -> Weight | None:
    """The weight that a parametrization makes, under the name of its largest original."""
    layer_name, _, attribute = owner.rpartition("parametrizations.")
    layer = layers[layer_name.rstrip(".")]

    def read() -> Tensor:
        # In training mode some parametrizations, such as spectral normalization, change their buffers when read.
        modes = {submodule: submodule.training for submodule in stored.modules()}
        stored.eval()
        try:
            with torch.no_grad():
                parameters = dict(stored.named_parameters())
                if any(is_sharded(parameter) for parameter in parameters.values()):
                    # What makes it may not know sharded tensors, so it gets whole ones.
                    gathered = {name: whole(parameter) for name, parameter in parameters.items()}
                    return torch.func.functional_call(stored, gathered, ()).detach()  # type: ignore[no-any-return]
                return getattr(layer, attribute).detach()  # type: ignore[no-any-return]
        finally:
            for submodule, training in modes.items():
                submodule.training = training

    originals = dict(stored.named_parameters(prefix=owner, recurse=False))
    return _made(originals, read, layer, attribute)


def _weight_norm(layer: nn.Module, attribute: str) -> WeightNorm | None:
    """The hook of the older ``torch.nn.utils.weight_norm``, if the parameter is one of its two."""
    if not attribute.endswith(("_g", "_v")):
        return None
    hooks = (hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm))
    return next((hook for hook in hooks if attribute in (f"{hook.name}_g", f"{hook.name}_v")), None)


def _weight_normalized(owner: str, layer: nn.Module, hook: WeightNorm) -> Weight | None:
    def read() -> Tensor:
        with torch.no_grad():
            return hook.compute_weight(layer).detach()  # type: ignore[no-any-return]

    prefix = f"{owner}." if owner else ""
    originals = {f"{prefix}{hook.name}{end}": getattr(layer, f"{hook.name}{end}") for end in ("_g", "_v")}
    return _made(originals, read, layer, hook.name)


def _made(
    originals: dict[str, nn.Parameter], read: Callable[[], Tensor], layer: nn.Module, attribute: str
) -> Weight | None:
    """A weight that is made from several parameters; ``None`` if what they make is no matrix."""
    first = max(originals, key=lambda name: originals[name].numel())
    if any(parameter.is_meta for parameter in originals.values()):
        raise ValueError(_META.format(name=plain_name(first)))
    effective = read()
    if not _is_matrix(attribute, effective, layer):
        return None
    shape = tuple(effective.shape)
    companions = tuple(plain_name(name) for name in originals if name != first)
    view = _view(layer, attribute, shape)
    name, parameter = plain_name(first), originals[first]
    return Weight(name, shape, effective.dtype, lambda: whole(read()), view, parameter, companions, is_made=True)


_META = "{name} is on the meta device and has no values: load the model's weights first"


def _read(name: str, parameter: nn.Parameter, layer: nn.Module) -> Tensor:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"{name} belongs to a lazy layer and has no shape yet: run a batch through it first")
    if parameter.is_meta:
        raise ValueError(_META.format(name=name))
    if is_quantized(parameter):
        return dequantize(name, parameter, layer)
    return whole(parameter.detach())


def _is_matrix(attribute: str, weight: Tensor, layer: nn.Module) -> bool:
    if isinstance(layer, _MATRIX_LAYERS) and attribute == "weight":
        return isinstance(weight, UninitializedParameter) or weight.ndim >= 2
    if isinstance(weight, UninitializedParameter) or isinstance(layer, _NORMALISATION):
        return False
    return is_matrix_shape(attribute, tuple(weight.shape))


def _view(layer: nn.Module, attribute: str, shape: tuple[int, ...]) -> View:
    if isinstance(layer, _ConvTransposeNd) and attribute == "weight":
        return partial(as_transposed_convolution, groups=layer.groups)
    if isinstance(layer, _ConvNd):
        return as_convolution
    return view_of(shape) if len(shape) > 1 else as_matrix
