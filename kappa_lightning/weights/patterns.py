"""Globs over parameter names: what a user means by ``include`` and ``exclude``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from kappa_lightning.weights.names import plain_parameters, tied_names
from kappa_lightning.weights.weight import Weight


def included(
    weights: Sequence[Weight], module: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[Weight]:
    """Those of a module's matrices that ``include`` matches and ``exclude`` does not."""
    names, aliases = plain_parameters(module), tied_names(module)
    wanted = match_names(names, include, argument="include", aliases=aliases)
    wanted -= match_names(names, exclude, argument="exclude", aliases=aliases)
    return [weight for weight in weights if weight.name in wanted]


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
