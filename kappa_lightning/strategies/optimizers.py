"""Parameters that leave their optimizers, and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

# The names are there if the optimizer was given named parameters.
_ALIGNED = frozenset({"params", "param_names"})

# The groups of an optimizer before anything left them, so that several callbacks may give theirs back in any order.
_WHOLE: WeakKeyDictionary[Optimizer, list[dict[str, list[Any]]]] = WeakKeyDictionary()


def drop_from_optimizers(optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Take parameters out of the groups of optimizers, and their state with them.

    A group that ends up empty stays, since learning-rate schedulers and a checkpoint count groups.

    Args:
        optimizers: all that may have some of them.
        parameters: what leaves; one that no optimizer has is ignored.

    Returns:
        A function that puts them back.

    Raises:
        ValueError: if an optimizer keeps its parameters elsewhere, too; none has been changed then.
    """
    for optimizer in optimizers:
        # By name, since not every build of PyTorch has the class.
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise ValueError(
                "ZeroRedundancyOptimizer has dealt its parameters to the processes already, and none can leave it: use "
                "a plain optimizer, or ModelParallelStrategy, which shards its state"
            )
    dropped = {id(parameter) for parameter in parameters}
    taken: list[tuple[Optimizer, set[int], dict[Tensor, Any]]] = []
    for optimizer in optimizers:
        here = {id(p) for group in optimizer.param_groups for p in group["params"]} & dropped
        if not here:
            continue
        if optimizer not in _WHOLE:
            _WHOLE[optimizer] = [
                {key: list(group[key]) for key in _ALIGNED.intersection(group)} for group in optimizer.param_groups
            ]
        for group in optimizer.param_groups:
            kept = [index for index, p in enumerate(group["params"]) if id(p) not in here]
            _rearrange(group, {key: [group[key][index] for index in kept] for key in _ALIGNED.intersection(group)})
        states = {p: optimizer.state.pop(p) for p in list(optimizer.state) if id(p) in here}
        _members_changed(optimizer)
        taken.append((optimizer, here, states))

    def undo() -> None:
        for optimizer, here, states in taken:
            _put_back(optimizer, here)
            optimizer.state.update(states)
            _members_changed(optimizer)
        taken.clear()

    return undo


def add_beside(
    optimizers: Iterable[Optimizer], members: Iterable[tuple[nn.Parameter, str, nn.Parameter]]
) -> Callable[[], None]:
    """Let parameters join the groups that have others, at the end.

    Args:
        optimizers: all that may have the others.
        members: each a parameter that is in a group, and the name and the parameter that join it there.

    Returns:
        A function that takes them out again.
    """
    joining: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for other, name, parameter in members:
        joining.setdefault(id(other), []).append((name, parameter))
    changed: list[Optimizer] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            added = [member for other in group["params"] for member in joining.get(id(other), ())]
            if added:
                group["params"] += [parameter for _, parameter in added]
                if "param_names" in group:
                    group["param_names"] += [name for name, _ in added]
                _members_changed(optimizer)
                changed.append(optimizer)
    parameters = [parameter for entries in joining.values() for _, parameter in entries]

    def undo() -> None:
        ids = {id(parameter) for parameter in parameters}
        for optimizer in changed:
            for group in optimizer.param_groups:
                kept = [index for index, p in enumerate(group["params"]) if id(p) not in ids]
                _rearrange(group, {key: [group[key][index] for index in kept] for key in _ALIGNED.intersection(group)})
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
            _members_changed(optimizer)
        changed.clear()

    return undo


def _put_back(optimizer: Optimizer, returning: set[int]) -> None:
    """Let parameters return to the groups and places where they were, as far as they are nowhere else by now."""
    for place, (group, whole) in enumerate(zip(optimizer.param_groups, _WHOLE.get(optimizer, ()), strict=False)):
        elsewhere = {id(p) for i, g in enumerate(optimizer.param_groups) if i != place for p in g["params"]}
        present = {id(p) for p in group["params"]}
        belong = present | (returning - elsewhere)
        # A group that another callback has added to keeps what it has got.
        known = {id(p) for p in whole["params"]}
        added = [index for index, p in enumerate(group["params"]) if id(p) not in known]
        back = [index for index, p in enumerate(whole["params"]) if id(p) in belong]
        _rearrange(
            group,
            {
                key: [whole[key][index] for index in back] + [group[key][index] for index in added]
                for key in _ALIGNED.intersection(group, whole)
            },
        )


def _rearrange(group: dict[str, Any], members: dict[str, list[Any]]) -> None:
    # In place: LBFGS and some optimizers that wrap another hold the same lists.
    for key, values in members.items():
        group[key][:] = values


def _members_changed(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        # It has one state for all its parameters together, which says nothing of others.
        optimizer.state.clear()
        optimizer._numel_cache = None


def optimized(optimizers: Iterable[Optimizer]) -> set[int]:
    """The ``id`` of every parameter that an optimizer has."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
