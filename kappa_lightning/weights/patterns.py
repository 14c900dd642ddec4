"""Globs over parameter names, and groups of them: what a user means by ``include`` and ``exclude``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from kappa_lightning.weights.groups import GROUPS, group_members, require_group
from kappa_lightning.weights.names import plain_parameters, tied_names
from kappa_lightning.weights.weight import Weight


def included(
    weights: Sequence[Weight], module: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[Weight]:
    """Those of a module's matrices that ``include`` matches and ``exclude`` does not."""
    wanted = match_parameters(module, include, argument="include")
    wanted -= match_parameters(module, exclude, argument="exclude")
    return [weight for weight in weights if weight.name in wanted]


def included_by_name(
    weights: Sequence[Weight], include: Sequence[str], exclude: Sequence[str], *, option: str = ""
) -> list[Weight]:
    """Those of a checkpoint's matrices that ``include`` matches and ``exclude`` does not.

    Args:
        weights: what the checkpoint holds.
        include: as in :func:`match_names`.
        exclude: as in :func:`match_names`.
        option: what stands before the two names for the user, such as ``"--"``.

    Raises:
        ValueError: as :func:`match_names`, or if one of those that remain cannot be read.
    """
    names = [weight.name for weight in weights]
    wanted = match_names(names, include, argument=f"{option}include", aliases={})
    wanted -= match_names(names, exclude, argument=f"{option}exclude", aliases={})
    chosen = [weight for weight in weights if weight.name in wanted]
    for weight in chosen:
        if weight.refusal is not None:
            raise ValueError(weight.refusal)
    return chosen


def match_parameters(module: nn.Module, patterns: Sequence[str], *, argument: str) -> set[str]:
    """:func:`match_names` over the plain names of a module's parameters, tied ones by their first name."""
    names, aliases = plain_parameters(module), tied_names(module)
    return match_names(names, patterns, argument=argument, aliases=aliases, module=module)


def check_patterns(patterns: Sequence[str], *, argument: str) -> tuple[str, ...]:
    """The patterns as a tuple, if they can be patterns of any model.

    Raises:
        TypeError: if ``patterns`` is a bare string, whose letters would each count as a pattern, or holds something
            else than strings.
        ValueError: if one names an unknown group.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{argument}={patterns!r} is one string: give a list or tuple of globs, such as [{patterns!r}]")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} holds {pattern!r}, which is no glob over parameter names")
        if pattern.startswith("@"):
            try:
                require_group(pattern)
            except ValueError as error:
                raise ValueError(f"{argument}: {error}") from None
    return tuple(patterns)


def match_names(
    names: Iterable[str],
    patterns: Sequence[str],
    *,
    argument: str,
    aliases: Mapping[str, str],
    module: nn.Module | None = None,
) -> set[str]:
    """The names that at least one pattern matches; a pattern that matches none is an error.

    Only a group in ``exclude`` may match none, so that a default can name one for models of all kinds.

    Args:
        names: parameter names.
        patterns: shell globs, in which ``*`` also matches dots, and groups such as ``"@attention"``
            (:data:`~kappa_lightning.weights.groups.GROUPS`).
        argument: the user's name for ``patterns``, for the error message.
        aliases: further names of tied parameters, each with the first name that stands for it.
        module: whose parameters they are, if it is at hand: its layers say more of a group than names do.

    Raises:
        TypeError: if ``patterns`` is a bare string, whose letters would each count as a pattern.
        ValueError: if a pattern matches no name, or there is no such group.
    """
    patterns = check_patterns(patterns, argument=argument)
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("@"):
            hits = group_members(pattern, names, module)
            if not hits and not argument.endswith("exclude"):
                raise ValueError(f"{argument}: {_no_member(pattern, names, aliases)}")
        else:
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits:
                tied = [(alias, first) for alias, first in aliases.items() if fnmatchcase(alias, pattern)]
                deeper = [name for name in names if fnmatchcase(name, f"*.{pattern}")]
                hint = (
                    f"it matches {tied[0][0]}, which is tied to {tied[0][1]}: use that name"
                    if tied
                    else f"{f'*.{pattern}'!r} would match {_some(deeper)}"
                    if deeper
                    else f"the model's parameters are named like {_some(names)}"
                )
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no parameter; {hint}")
        matched |= hits
    return matched


def _no_member(group: str, names: Sequence[str], aliases: Mapping[str, str]) -> str:
    tied = sorted(group_members(group, aliases))
    hint = (
        f"its {tied[0]} is tied to {aliases[tied[0]]}, which counts as embedding"
        if tied
        else f"its parameters are named like {_some(names)}; use globs"
    )
    return f"the model has nothing of the group {group!r} ({GROUPS[group]}): {hint}"


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
