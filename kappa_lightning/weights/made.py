"""Weights that a layer makes from other parameters: by parametrizations, by the older hooks, or in its forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kappa_lightning.weights.sharded import is_sharded, whole


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How one weight is made.

    Attributes:
        layer: the layer that uses it.
        attribute: its name there.
        parameters: everything that it is made from, by the first names; the first is the one that the weight goes by.
        read: makes it, without a trace in the module.
        buffers: returns what else it is made from.
    """

    layer: nn.Module
    attribute: str
    parameters: Mapping[str, nn.Parameter]
    read: Callable[[], Tensor]
    buffers: Callable[[], tuple[Tensor, ...]] = tuple


class Recipes:
    """The recipes of a module, each made once."""

    def __init__(self, layers: Mapping[str, nn.Module], names: Mapping[int, str]) -> None:
        self._layers = layers
        self._names = names
        self._known: dict[tuple[int, str], Recipe] = {}

    def of(self, stored_name: str) -> Recipe | None:
        """What is made from the parameter of this name; ``None`` if a layer uses it as it is."""
        owner, _, attribute = stored_name.rpartition(".")
        parts = stored_name.split(".")
        for index, part in enumerate(parts[:-2]):
            stored = self._layers.get(".".join(parts[: index + 2])) if part == "parametrizations" else None
            if isinstance(stored, ParametrizationList):
                layer, made = self._layers[".".join(parts[:index])], parts[index + 1]
                return self._once(layer, made, partial(self._parametrized, layer, made, stored))
        layer = self._layers[owner]
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and attribute in (f"{hook.name}_g", f"{hook.name}_v"):
                return self._once(layer, hook.name, partial(self._weight_norm, layer, hook))
            if isinstance(hook, SpectralNorm) and attribute == f"{hook.name}_orig":
                return self._once(layer, hook.name, partial(self._spectral_norm, layer, hook))
            if isinstance(hook, BasePruningMethod) and attribute == f"{hook._tensor_name}_orig":
                return self._once(layer, hook._tensor_name, partial(self._pruned, layer, hook))
        if attribute == "weight":
            standardize = _STANDARDIZED.get(type(layer).__name__)
            if standardize is not None:
                return self._once(layer, attribute, partial(self._standardized, layer, standardize))
            for name in ("weight_fake_quant", "weight_fake_quantizer"):  # of torch.ao and of torchao
                if isinstance(getattr(layer, name, None), nn.Module):
                    return self._once(layer, attribute, partial(self._fake_quantized, layer, name))
        return None

    def _once(self, layer: nn.Module, attribute: str, make: Callable[[], Recipe]) -> Recipe:
        key = (id(layer), attribute)
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _parametrized(self, layer: nn.Module, attribute: str, stored: ParametrizationList) -> Recipe:
        def read() -> Tensor:
            # In training mode some parametrizations, such as spectral normalization, change their buffers when read.
            with torch.no_grad(), _evaluating(stored):
                parameters = dict(stored.named_parameters())
                if any(is_sharded(parameter) for parameter in parameters.values()):
                    # What makes it may not know sharded tensors, so it gets whole ones.
                    gathered = {name: whole(parameter) for name, parameter in parameters.items()}
                    return torch.func.functional_call(stored, gathered, ()).detach()  # type: ignore[no-any-return]
                return getattr(layer, attribute).detach()  # type: ignore[no-any-return]

        originals = {id(parameter) for parameter in stored.parameters(recurse=False)}
        # The largest original leads; what further modules of the parametrization hold, such as an A and a B, follows.
        ordered = sorted(stored.parameters(), key=lambda p: (id(p) in originals, p.numel()), reverse=True)
        named = {self._names[id(parameter)]: parameter for parameter in ordered}
        return Recipe(layer, attribute, named, read, lambda: tuple(stored.buffers()))

    def _weight_norm(self, layer: nn.Module, hook: WeightNorm) -> Recipe:
        def read() -> Tensor:
            with torch.no_grad():
                return hook.compute_weight(layer).detach()  # type: ignore[no-any-return]

        return self._from(layer, hook.name, (f"{hook.name}_v", f"{hook.name}_g"), read)

    def _spectral_norm(self, layer: nn.Module, hook: SpectralNorm) -> Recipe:
        def read() -> Tensor:
            with torch.no_grad():
                return hook.compute_weight(layer, do_power_iteration=False).detach()

        buffers = (f"{hook.name}_u", f"{hook.name}_v")
        return self._from(layer, hook.name, (f"{hook.name}_orig",), read, buffers)

    def _pruned(self, layer: nn.Module, hook: BasePruningMethod) -> Recipe:
        def read() -> Tensor:
            with torch.no_grad():
                return hook.apply_mask(layer).detach()  # type: ignore[no-any-return, no-untyped-call]

        mask = (f"{hook._tensor_name}_mask",)
        return self._from(layer, hook._tensor_name, (f"{hook._tensor_name}_orig",), read, mask)

    def _standardized(self, layer: nn.Module, standardize: Callable[[nn.Module], Tensor]) -> Recipe:
        def read() -> Tensor:
            with torch.no_grad():
                return standardize(layer).detach()

        # timm's scaled kind has a gain for each channel, too.
        gain = ("gain",) if isinstance(getattr(layer, "gain", None), nn.Parameter) else ()
        return self._from(layer, "weight", ("weight", *gain), read)

    def _fake_quantized(self, layer: nn.Module, name: str) -> Recipe:
        def read() -> Tensor:
            # By a copy, since a forward pass moves the ranges that it has seen.
            with torch.no_grad():
                return copy.deepcopy(getattr(layer, name))(layer.weight).detach()  # type: ignore[no-any-return]

        ranges = partial(_buffers_of, layer, name)
        return Recipe(layer, "weight", {self._names[id(layer.weight)]: layer.weight}, read, ranges)  # type: ignore[dict-item]

    def _from(
        self,
        layer: nn.Module,
        attribute: str,
        held: tuple[str, ...],
        read: Callable[[], Tensor],
        buffers: tuple[str, ...] = (),
    ) -> Recipe:
        named = {self._names[id(parameter)]: parameter for parameter in (getattr(layer, name) for name in held)}
        return Recipe(layer, attribute, named, read, lambda: tuple(getattr(layer, name) for name in buffers))


def _buffers_of(layer: nn.Module, name: str) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name).buffers())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode; then each of its modules in the mode that it had."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():  # the outer ones first, whose train() reaches the inner ones
            if submodule.training != training:
                submodule.train(training)


def _standardized_by_channel(layer: nn.Module) -> Tensor:
    """(W − mean) / √(var + ε) of each output channel, as ``WeightStandardizedConv2d`` and ``StdConv2d`` have it."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    variance, mean = torch.var_mean(weight.flatten(1), dim=1, correction=0)
    shape = (-1, *(1 for _ in weight.shape[1:]))
    return (weight - mean.view(shape)) / (variance.view(shape) + layer.eps).sqrt()  # type: ignore[operator]


def _scaled_by_channel(layer: nn.Module) -> Tensor:
    """The same times ``gain · scale``, as timm's ``ScaledStdConv2d`` has it."""
    gain: Tensor = layer.gain  # type: ignore[assignment]
    return _standardized_by_channel(layer) * gain * layer.scale  # type: ignore[operator]


def _normalized_by_column(layer: nn.Module) -> Tensor:
    """Columns of length 1, as the cosine classifiers of the wav2vec 2.0 family have it."""
    return functional.normalize(layer.weight, dim=0)  # type: ignore[arg-type]


# Layers that standardize their weight in forward, of transformers (BiT, hybrid ViT, speaker verification) and timm.
_STANDARDIZED: dict[str, Callable[[nn.Module], Tensor]] = {
    "AMSoftmaxLoss": _normalized_by_column,
    "WeightStandardizedConv2d": _standardized_by_channel,
    "StdConv2d": _standardized_by_channel,
    "StdConv2dSame": _standardized_by_channel,
    "ScaledStdConv2d": _scaled_by_channel,
    "ScaledStdConv2dSame": _scaled_by_channel,
}
