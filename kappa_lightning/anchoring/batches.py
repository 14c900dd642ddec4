"""Batches that are kept for a whole run: on the CPU, shared by processes, written to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from kappa_lightning.files import replacing

_KIND = "kappa_lightning.references"


def keep(batches: Iterable[Any], limit: int | None) -> list[Any]:
    """The first batches of an iterable, copied to the CPU, mappings as dicts.

    Args:
        batches: dicts, tuples, lists or tensors; whatever is no tensor in them stays as it is.
        limit: how many; all if ``None``.

    Raises:
        ValueError: if there is none.
    """
    kept = [_kept(batch) for batch in islice(batches, limit)]
    if not kept:
        raise ValueError("the references are empty: give a dataloader with at least one batch")
    return kept


def share_of(batch: Any, index: int, count: int) -> tuple[Any, bool]:
    """The samples of a batch that one of several processes works on, and whether they count.

    Where there are fewer samples than processes, those that would have none get the first one, which does not count:
    a forward pass may need all of them.

    Example:
        >>> import torch
        >>> share_of({"x": torch.tensor([[1], [2], [3]]), "name": "a"}, 1, 2)
        ({'x': tensor([[2]]), 'name': 'a'}, True)
    """
    if count == 1:
        return batch, True
    size = num_samples(batch)
    start = slice(index, None, count) if index < size else slice(0, 1)
    return _sliced(batch, start, size), index < size


def num_samples(batch: Any) -> int:
    """The length of the first dimension of a batch's tensors.

    Raises:
        ValueError: if it has no tensor with a dimension.
    """
    first = next((tensor for tensor in _tensors(batch) if tensor.ndim), None)
    if first is None:
        raise ValueError("a reference batch has no tensor with samples, so it cannot be shared among processes")
    return len(first)


def save_batches(path: str | os.PathLike[str], batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Write batches, each a mapping of names to tensors, as one ``.safetensors`` file.

    Raises:
        TypeError: if a batch is of another kind.
    """
    from safetensors.torch import save_file

    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise TypeError(f"reference batch {number} is no mapping of names to tensors, which a file can hold")
    tensors = {
        f"{number}.{name}": value.contiguous() for number, batch in enumerate(batches) for name, value in batch.items()
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"kind": _KIND, "batches": json.dumps(len(batches))})


def load_batches(path: str | os.PathLike[str]) -> list[dict[str, Tensor]]:
    """Read what :func:`save_batches` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of references {file}")
    try:
        with safe_open(file, framework="pt") as tensors:
            described = tensors.metadata() or {}
            if described.get("kind") != _KIND:
                raise ValueError(f"{file} holds no references: give a file that save_references wrote")
            batches: list[dict[str, Tensor]] = []
            for number in range(_number_of_batches(described, file)):
                names = [key for key in tensors.keys() if key.startswith(f"{number}.")]  # noqa: SIM118
                if not names:
                    raise ValueError(f"{file} lacks the reference batch {number} that it should hold: write it again")
                batches.append({key.partition(".")[2]: tensors.get_tensor(key) for key in names})
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}): write it again") from error
    return batches


def _number_of_batches(described: Mapping[str, str], file: Path) -> int:
    number = described.get("batches", "")
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{file} says that it holds {number!r} reference batches: it is damaged, so write it again")
    return int(number)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _kept(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_kept(part) for part in value]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _sliced(value: Any, part: slice, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _sliced(entry, part, size) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_sliced(entry, part, size) for entry in value]
    return value
