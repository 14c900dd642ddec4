"""A name for the content of a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.fingerprint import fingerprint, hash_of_text


def content_key(batch: Any, but: Collection[str] = ()) -> str:
    """A name for the content of a batch, the same in every process and on every device.

    Tensors, texts and numbers count, in mappings, lists and tuples; other objects do not.

    Args:
        batch: of any structure.
        but: entries of mappings that do not count.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> import torch
        >>> content_key({"a": torch.ones(2), "b": 1}, but=("b",)) == content_key({"a": torch.ones(2)})
        True
        >>> content_key([1, 2]) == content_key([2, 1])
        False
    """
    return f"{hash_of_text(' '.join(_contents(batch, '', but))):016x}"


def _contents(value: Any, path: str, but: Collection[str]) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield f"{path}={fingerprint(value)}"
    elif isinstance(value, Mapping):
        for name in sorted(value):
            if name not in but:
                yield from _contents(value[name], f"{path}.{name}", but)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _contents(part, f"{path}.{number}", but)
    elif isinstance(value, str | int | float | bool | torch.dtype | None):
        yield f"{path}={value!r}"
