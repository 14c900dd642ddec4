"""The index of a checkpoint in several files: which tensors lie in which."""

from __future__ import annotations

import json
from pathlib import PurePosixPath, PureWindowsPath


def shards_of_index(index: str, content: str) -> dict[str, list[str]]:
    """The names of the tensors by the file that an index places them in.

    Args:
        index: its name, for messages.
        content: its text.

    Raises:
        ValueError: if it is none, is damaged, or names a file that does not lie beside it.

    Example:
        >>> shards_of_index("index.json", '{"weight_map": {"a.weight": "1.safetensors", "b.weight": "1.safetensors"}}')
        {'1.safetensors': ['a.weight', 'b.weight']}
    """
    try:
        places = list(json.loads(content)["weight_map"].items())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of shards, or a damaged one: {error!r}") from error
    shards: dict[str, list[str]] = {}
    for name, shard in places:
        if not isinstance(shard, str):
            raise ValueError(f"{index} is a damaged index: it names {shard!r} as the shard of {name}")
        if not _lies_beside(shard):
            raise ValueError(
                f"{index} names {shard!r} as the shard of {name}, which does not lie beside it: such an index is not "
                "followed"
            )
        shards.setdefault(shard, []).append(name)
    return shards


def _lies_beside(shard: str) -> bool:
    """Whether a shard is named by a file name alone, whatever system wrote the index."""
    return (
        shard not in ("", ".", "..")
        and PurePosixPath(shard).name == shard
        and PureWindowsPath(shard).name == shard
        and not PureWindowsPath(shard).drive
    )
