"""Parameter names: tied ones, and those that ``torch.compile`` prefixes."""

from __future__ import annotations

from torch import nn

_COMPILED = "_orig_mod."


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of ``torch.compile``.

    Example:
        >>> plain_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace(_COMPILED, "")


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """``named_parameters()`` by plain names, tied ones once, in order."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def tied_names(module: nn.Module) -> dict[str, str]:
    """For every further name of a tied parameter, the first name, which stands for it.

    Example:
        >>> from torch import nn
        >>> net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        >>> net["head"].weight = net["embed"].weight
        >>> tied_names(net)
        {'head.weight': 'embed.weight'}
    """
    first = {id(parameter): name for name, parameter in plain_parameters(module).items()}
    every = [(plain_name(name), parameter) for name, parameter in module.named_parameters(remove_duplicate=False)]
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}
