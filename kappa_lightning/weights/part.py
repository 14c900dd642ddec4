"""What a part of a parameter is: its name, and which entries it has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Index = tuple[int | slice, ...]

_NAME = re.compile(r"(?P<parameter>.+)\[(?P<label>[^\[\]]+)\]")


@dataclass(frozen=True, slots=True)
class Part:
    """Some entries of a parameter, such as one expert of a fused tensor.

    Attributes:
        parameter: the name of the parameter, as ``named_parameters()`` gives it.
        label: which part it is: ``"17"`` for an expert, ``"17:gate"`` for half of one, ``"head 3"``.
        index: the entries, in basic indexing, so that ``tensor[index]`` is a view.

    Example:
        >>> Part("mlp.experts.gate_up_proj", "17", (17,)).name
        'mlp.experts.gate_up_proj[17]'
    """

    parameter: str
    label: str
    index: Index

    @property
    def name(self) -> str:
        """The parameter's name with the label in brackets, which is what a selection and a table call it."""
        return f"{self.parameter}[{self.label}]"

    def to_dict(self) -> dict[str, Any]:
        """The part as plain values, for a checkpoint."""
        index = [entry if isinstance(entry, int) else [entry.start, entry.stop, entry.step] for entry in self.index]
        return {"parameter": self.parameter, "label": self.label, "index": index}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Part:
        """The inverse of :meth:`to_dict`."""
        index = tuple(entry if isinstance(entry, int) else slice(*entry) for entry in state["index"])
        return cls(state["parameter"], state["label"], index)


def split_name(name: str) -> tuple[str, str | None]:
    """The parameter's name and the label of a part's name; the label is ``None`` if it names a whole parameter.

    Example:
        >>> split_name("experts.down_proj[3]"), split_name("head.weight")
        (('experts.down_proj', '3'), ('head.weight', None))
    """
    found = _NAME.fullmatch(name)
    return (name, None) if found is None else (found["parameter"], found["label"])


def overlap(
    index: Index, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[Index, Index] | None:
    """What a part has in common with a block of its tensor, such as the shard of one process.

    Args:
        index: the part's entries.
        shape: of the tensor.
        offsets: where the block begins in each dimension.
        sizes: its size in each dimension.

    Returns:
        The common entries as an index into the block and as one into the part; ``None`` if there are none.

    Example:
        >>> overlap((1, slice(0, 6, 2)), (2, 6, 3), offsets=(1, 3, 0), sizes=(1, 3, 3))
        ((0, slice(1, 2, 2), slice(0, 3, 1)), (slice(2, 3, None), slice(0, 3, None)))
    """
    of_block: list[int | slice] = []
    of_part: list[int | slice] = []
    whole: Index = (slice(None),) * (len(shape) - len(index))
    for entries, size, offset, length in zip((*index, *whole), shape, offsets, sizes, strict=True):
        if isinstance(entries, int):
            at = entries % size - offset
            if not 0 <= at < length:
                return None
            of_block.append(at)
            continue
        chosen = range(size)[entries]
        first = max(0, -(-(offset - chosen.start) // chosen.step))
        last = min(len(chosen), -(-(offset + length - chosen.start) // chosen.step))
        if first >= last:
            return None
        inside = chosen[first:last]
        of_block.append(slice(inside[0] - offset, inside[-1] - offset + 1, chosen.step))
        of_part.append(slice(first, last))
    return tuple(of_block), tuple(of_part)


def expert_parts(parameter: str, shape: tuple[int, ...]) -> list[Part]:
    """Every expert of a fused tensor of shape (experts, ...) as a part.

    Example:
        >>> [part.name for part in expert_parts("experts.down_proj", (2, 8, 4))]
        ['experts.down_proj[0]', 'experts.down_proj[1]']
    """
    return [Part(parameter, str(expert), (expert,)) for expert in range(shape[0])]


def gate_up_parts(parameter: str, shape: tuple[int, ...], *, dim: int = 1, interleaved: bool = False) -> list[Part]:
    """The gate and the up projection of every expert of a fused ``gate_up_proj``, each a part.

    Args:
        parameter: its name.
        shape: (experts, …), in which ``dim`` holds both projections.
        dim: 1 where rows are outputs, as in Mixtral and Qwen3-MoE; 2 where the tensor is transposed, as in Llama 4 and
            gpt-oss.
        interleaved: whether gate and up take turns (gpt-oss) instead of one half each.

    Raises:
        ValueError: if ``dim`` holds an odd number of entries.

    Example:
        >>> [(part.label, part.index) for part in gate_up_parts("gate_up_proj", (1, 6, 4))]
        [('0:gate', (0, slice(0, 3, 1))), ('0:up', (0, slice(3, 6, 1)))]
        >>> [(part.label, part.index[-1]) for part in gate_up_parts("w", (1, 4, 6), dim=2, interleaved=True)]
        [('0:gate', slice(0, 6, 2)), ('0:up', slice(1, 6, 2))]
    """
    size = shape[dim]
    if size % 2:
        raise ValueError(f"{parameter} has {size} entries in dimension {dim}, which is no gate and up of equal size")
    step = 2 if interleaved else 1
    gate = slice(0, size, 2) if interleaved else slice(0, size // 2, step)
    up = slice(1, size, 2) if interleaved else slice(size // 2, size, step)
    between: Index = (slice(None),) * (dim - 1)
    return [
        Part(parameter, f"{expert}:{half}", (expert, *between, entries))
        for expert in range(shape[0])
        for half, entries in (("gate", gate), ("up", up))
    ]


def head_parts(parameter: str, shape: tuple[int, int], heads: int, *, dim: int = 0) -> list[Part]:
    """The attention heads of a projection, each a part.

    Args:
        parameter: its name.
        shape: (rows, cols).
        heads: how many heads ``dim`` holds: of grouped queries, the number of key and value heads for those.
        dim: 0 where a head is a block of rows (q, k and v of ``nn.Linear``), 1 where one of columns (o).

    Raises:
        ValueError: if the heads do not divide the dimension.

    Example:
        >>> [(part.label, part.index[1]) for part in head_parts("o_proj.weight", (6, 4), 2, dim=1)]
        [('head 0', slice(0, 2, None)), ('head 1', slice(2, 4, None))]
    """
    size = shape[dim]
    if heads < 1 or size % heads:
        raise ValueError(f"{parameter} has {size} entries in dimension {dim}, which {heads} heads do not divide")
    width = size // heads
    before: Index = (slice(None),) * dim
    return [
        Part(parameter, f"head {head}", (*before, slice(head * width, (head + 1) * width))) for head in range(heads)
    ]
