"""The weight matrices of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kappa_lightning.weights.layers import is_matrix, view_for
from kappa_lightning.weights.made import Recipe, Recipes
from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.part import split_name
from kappa_lightning.weights.quantized import dequantize, is_quantized, logical_shape
from kappa_lightning.weights.sharded import whole
from kappa_lightning.weights.weight import Weight


def find_weights(module: nn.Module) -> list[Weight]:
    """All matrices of a module, tied ones once under their first name, in the order of ``named_parameters()``.

    A weight that its layer makes from parameters (``torch.nn.utils.parametrize``, weight or spectral normalization,
    pruning, standardized convolutions, training for quantization) is read as the layer uses it, under the name of the
    largest of them. One that is sharded over processes is read whole, which they must do together. A layer without
    entries has no matrix.

    Args:
        module: any module; a parameter counts whether or not it requires a gradient.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(weight.name, tuple(weight.matrices().shape)) for weight in find_weights(net)]
        [('0.weight', (1, 8, 75)), ('3.weight', (1, 2, 8))]
    """
    return list(_weights(module, dict(module.named_modules(remove_duplicate=False))))


def _weights(module: nn.Module, layers: dict[str, nn.Module]) -> Iterator[Weight]:
    recipes = Recipes(layers, {id(parameter): name for name, parameter in module.named_parameters()})
    for stored_name, parameter in module.named_parameters():
        recipe = recipes.of(stored_name)
        if recipe is not None:
            leading = next(iter(recipe.parameters))
            made = _made(recipe) if stored_name == leading else None
            if made is not None:
                yield made
            continue
        owner, _, attribute = stored_name.rpartition(".")
        layer = layers[owner]
        if split_name(attribute)[0] in layer._parameters and split_name(attribute)[1] is not None:
            continue  # a part of another parameter, in whose memory it lies
        if is_matrix(attribute, parameter, layer):
            parts = tuple(
                part
                for other, part in layer._parameters.items()
                if part is not None and other != attribute and split_name(other)[0] == attribute
            )
            name = plain_name(stored_name)
            shape = () if isinstance(parameter, UninitializedParameter) else logical_shape(parameter)
            read = partial(_read, name, parameter, layer)
            yield Weight(name, shape, parameter.dtype, read, view_for(layer, attribute, shape), parameter, parts=parts)


def _made(recipe: Recipe) -> Weight | None:
    """The weight of a recipe; ``None`` if it is no matrix."""
    name, *companions = map(plain_name, recipe.parameters)
    parameters = tuple(recipe.parameters.values())
    is_meta = any(parameter.is_meta for parameter in parameters)
    try:
        effective = recipe.read()
    except (RuntimeError, NotImplementedError) as error:
        if is_meta:  # not everything that makes a weight can do so without values
            raise ValueError(_META.format(name=name)) from error
        raise
    if not is_matrix(recipe.attribute, effective, recipe.layer):
        return None

    def read() -> Tensor:
        if any(parameter.is_meta for parameter in parameters):
            raise ValueError(_META.format(name=name))
        return whole(recipe.read())

    def sources() -> tuple[Tensor, ...]:
        return tuple(whole(tensor.detach()) for tensor in (*parameters, *recipe.buffers()))

    shape = tuple(effective.shape)
    view = view_for(recipe.layer, recipe.attribute, shape)
    made = Weight(name, shape, effective.dtype, read, view, parameters[0], tuple(companions), parameters)
    return replace(made, sources=sources)


_META = "{name} is on the meta device and has no values: load the model's weights first"


def _read(name: str, parameter: nn.Parameter, layer: nn.Module) -> Tensor:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"{name} belongs to a lazy layer and has no shape yet: run a batch through it first")
    if parameter.is_meta:
        raise ValueError(_META.format(name=name))
    if is_quantized(parameter):
        return dequantize(name, parameter, layer)
    return whole(parameter.detach())
