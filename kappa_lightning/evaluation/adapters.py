"""The model below its adapters: what a module computes when LoRA and its like are off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


def has_adapters(module: nn.Module) -> bool:
    """Whether a module has adapters that can be turned off.

    Example:
        >>> has_adapters(nn.Linear(2, 2))
        False
    """
    return bool(_peft_layers(module) or _prompted(module) or _adapting(module))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Let a module compute what its base model does.

    Turned off are the adapters of PEFT, whether by ``get_peft_model`` or transformers' ``add_adapter`` (those that
    were merged are taken out for the time), copies of ``modules_to_save``, prompts, and parametrizations with
    parameters of their own on a frozen tensor, such as a LoRA as ``torch.nn.utils.parametrize``. Afterwards all is as
    before, which adapters train included.

    Args:
        module: such as a LightningModule that holds the model.

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> class Shift(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.by = nn.Parameter(torch.ones(()))
        ...     def forward(self, weight):
        ...         return weight + self.by
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(layer.weight.requires_grad_(False))
        >>> _ = parametrize.register_parametrization(layer, "weight", Shift())
        >>> with adapters_off(layer):
        ...     layer.weight.item()
        0.0
        >>> layer.weight.item()
        1.0
    """
    required = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    with ExitStack() as stack:
        stack.callback(_require_again, required)
        for model in _prompted(module):
            stack.enter_context(model.disable_adapter())
        for layer in _peft_layers(module):
            if not layer.disable_adapters:
                merged = list(getattr(layer, "merged_adapters", ()))
                if merged:
                    # Taking an update out and in again rounds.
                    stack.callback(_put_back, [(p, p.detach().clone()) for p in layer.get_base_layer().parameters()])
                    stack.callback(layer.merge, adapter_names=merged)
                    layer.unmerge()
                stack.callback(layer.enable_adapters, True)
                layer.enable_adapters(False)
        for made in _adapting(module):
            stack.callback(made.__dict__.pop, "forward", None)
            # In the instance, where it comes before that of the class.
            made.__dict__["forward"] = partial(_without_adapters, made)
        yield


def _put_back(contents: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, content in contents:
        parameter.data.copy_(content)


def _require_again(required: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires in required:
        if parameter.requires_grad != requires:
            parameter.requires_grad_(requires)


def _peft_layers(module: nn.Module) -> list[Any]:
    # Without an import: a module with such layers has imported PEFT already.
    return [
        part
        for part in module.modules()
        if type(part).__module__.partition(".")[0] == "peft"
        and hasattr(type(part), "enable_adapters")
        and hasattr(type(part), "disable_adapters")
        and isinstance(getattr(type(part), "disable_adapters", None), property)
    ]


def _prompted(module: nn.Module) -> list[Any]:
    return [
        part
        for part in module.modules()
        if type(part).__module__.partition(".")[0] == "peft" and getattr(part, "_is_prompt_learning", False)
    ]


def _adapting(module: nn.Module) -> list[ParametrizationList]:
    """Frozen tensors with parametrizations that have parameters of their own."""
    return [
        part
        for part in module.modules()
        if isinstance(part, ParametrizationList)
        and isinstance(getattr(part, "original", None), Tensor)
        and not part.original.requires_grad
        and any(True for made in part for _ in made.parameters())
    ]


def _without_adapters(made: ParametrizationList) -> Tensor:
    value: Tensor = made.original
    for parametrization in made:
        if not any(True for _ in parametrization.parameters()):
            value = parametrization(value)
    return value
