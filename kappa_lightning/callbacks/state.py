"""What a checkpoint holds of a callback, whatever the arguments that the callback had then."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from lightning.pytorch.callbacks import Callback


def figures_in(
    checkpoint: Mapping[str, Any], callback: Callback, wanted: Collection[str] | None
) -> dict[str, Any] | None:
    """The state of a callback that keeps a ``baseline`` and a ``history``, from a checkpoint.

    It is found under the callback's own key or, if its arguments were others then or the checkpoint is one of version
    0.1.0, under that of the callback of its class which has most of the baselines.

    Args:
        checkpoint: with the states of its callbacks.
        callback: whose state is wanted.
        wanted: the names of which it needs a baseline; ``None`` if any will do.

    Returns:
        A copy; ``None`` if there is none.
    """
    states: Mapping[Any, Any] = checkpoint.get("callbacks") or {}
    own: dict[str, Any] | None = states.get(callback.state_key)
    if own:
        return deepcopy(own)
    kind = type(callback).__qualname__
    others = [
        state
        for key, state in states.items()
        if isinstance(key, str) and key.partition("{")[0] == kind and isinstance(state, dict) and state.get("baseline")
    ]
    if not others:
        return None

    def known(state: dict[str, Any]) -> int:
        return len(state["baseline"]) if wanted is None else len(set(wanted) & set(state["baseline"]))

    best = max(others, key=known)
    if not known(best):
        return None
    merged: dict[str, Any] = deepcopy(best)
    # The probes of two callbacks may have become those of one.
    for state in others:
        merged["baseline"] = {**state["baseline"], **merged["baseline"]}
        for part in ("probes", "items"):
            merged[part] = {**deepcopy(state.get(part, {})), **merged.get(part, {})}
    return merged
