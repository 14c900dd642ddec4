"""Parameter names: globs over them, tied ones, and those that ``torch.compile`` prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

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


def match_names(
    names: Iterable[str], patterns: Sequence[str], *, argument: str, aliases: Mapping[str, str]
) -> set[str]:
    """The names that at least one shell glob matches; a glob that matches none is an error.

    Args:
        names: parameter names.
        patterns: globs, in which ``*`` also matches dots.
        argument: the user's name for ``patterns``, for the error message.
        aliases: further names of tied parameters, each with the first name that stands for it.

    Raises:
        TypeError: if ``patterns`` is a bare string, whose letters would each count as a pattern.
        ValueError: if a pattern matches no name.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{argument}={patterns!r} is one string: give a list or tuple of globs, such as [{patterns!r}]")
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            tied = [(alias, first) for alias, first in aliases.items() if fnmatchcase(alias, pattern)]
            hint = (
                f"it matches {tied[0][0]}, which is tied to {tied[0][1]}: use that name"
                if tied
                else f"the model's parameters are named like {_some(names)}"
            )
            raise ValueError(f"{argument}: the pattern {pattern!r} matches no parameter; {hint}")
        matched |= hits
    return matched


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
