"""Which parts the matrices of a model have: its experts, the halves of a gate and up projection, attention heads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.weights.model import find_weights
from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.part import Part, expert_parts, gate_up_parts, head_parts
from kappa_lightning.weights.weight import Weight, as_matrix

GATE_UP = ("together", "apart")
"""Whether gate and up of one expert of a fused ``gate_up_proj`` are one candidate or two."""

# The width of an attention head, as attention layers name it.
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head")
_QUERY = ("q_proj", "query", "q", "q_b_proj", "wq", "Wq", "to_q", "q_lin")
_KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k", "v", "wk", "wv", "Wk", "Wv", "to_k", "to_v", "k_lin", "v_lin")
_OUTPUT = ("o_proj", "out_proj", "dense", "o", "wo", "Wo", "c_proj", "out_lin")


def split_into_parts(
    weights: Sequence[Weight],
    module: nn.Module | None = None,
    *,
    experts: bool = True,
    gate_up: str = "together",
    heads: bool = False,
) -> list[Weight]:
    """Matrices in which those with parts are replaced by a weight for each part, in the same order.

    Experts are the matrices of a stack (a fused parameter of shape (experts, rows, cols)). Heads are blocks of rows of
    query, key and value projections and blocks of columns of the output projection; their width is what the attention
    layer calls ``head_dim`` or the like, so grouped queries have fewer heads in key and value. A projection whose layer
    does not tell stays whole, and so does a weight that is quantized or made by a parametrization.

    Args:
        weights: what was found in a model or a checkpoint, or some of it.
        module: the model, so that the layers around its weights can be asked; without it there are no heads.
        experts: whether stacks are split.
        gate_up: ``"apart"`` splits each expert of a fused ``gate_up_proj`` into its gate and its up projection.
        heads: whether attention projections are split.

    Raises:
        ValueError: if ``gate_up`` is unknown, or ``heads`` are wanted and there are none.

    Example:
        >>> from torch import nn
        >>> from kappa_lightning.weights import find_weights
        >>> attention = nn.MultiheadAttention(8, num_heads=2)
        >>> [weight.name for weight in split_into_parts(find_weights(attention), attention, heads=True)][4:]
        ['in_proj_weight[v head 0]', 'in_proj_weight[v head 1]', 'out_proj.weight[head 0]', 'out_proj.weight[head 1]']
    """
    if gate_up not in GATE_UP:
        raise ValueError(f"gate_up={gate_up!r} is unknown: use one of {', '.join(map(repr, GATE_UP))}")
    layers: dict[str, nn.Module] = {}
    if module is not None:
        layers = {plain_name(name): layer for name, layer in module.named_modules(remove_duplicate=False)}
    shapes = {weight.name: weight.shape for weight in (weights if module is None else find_weights(module))}
    found: list[Weight] = []
    for weight in weights:
        parts: list[Part] = []
        # A quantized parameter has another shape than what it stands for.
        plain = weight.parameter is None or tuple(weight.parameter.shape) == weight.shape
        if plain and not weight.is_made:
            if experts and weight.is_stack:
                parts = _experts(weight, layers, shapes, gate_up)
            elif heads and len(weight.shape) == 2:
                parts = _heads(weight, layers)
        found += _weights_of(weight, parts) if len(parts) > 1 else [weight]
    if heads and not any(weight.part is not None and "head" in weight.part.label for weight in found):
        raise ValueError(
            'heads="each" finds no attention whose heads it can tell: its layer must say how wide one is (head_dim or '
            'attention_head_size), or be an nn.MultiheadAttention; use heads="whole"'
        )
    return found


def _weights_of(weight: Weight, parts: Sequence[Part]) -> Iterator[Weight]:
    once = _Once(weight.read, len(parts))
    entries = torch.empty(weight.shape, device="meta")
    for part in parts:
        shape = tuple(entries[part.index].shape)

        def read(part: Part = part) -> Tensor:
            return once.read()[part.index]

        yield replace(weight, name=part.name, shape=shape, read=read, view=as_matrix, companions=(), part=part)


class _Once:
    """Reads a whole once for all of its parts, and lets go of it when each has had its turn."""

    def __init__(self, read: Callable[[], Tensor], uses: int) -> None:
        self._read, self._uses, self._left = read, uses, uses
        self._value: Tensor | None = None
        self._lock = threading.Lock()

    def read(self) -> Tensor:
        with self._lock:
            value = self._read() if self._value is None else self._value
            self._left -= 1
            if self._left == 0:
                self._left = self._uses
                self._value = None
            else:
                self._value = value
            return value


def _experts(
    weight: Weight, layers: dict[str, nn.Module], shapes: dict[str, tuple[int, ...]], gate_up: str
) -> list[Part]:
    owner, _, attribute = weight.name.rpartition(".")
    if gate_up == "apart" and attribute == "gate_up_proj":
        down = shapes.get(f"{owner}.down_proj" if owner else "down_proj")
        dim = None if down is None else _gate_up_dim(weight.shape, down)
        if dim is None:
            raise ValueError(
                f"{weight.name} of shape {weight.shape} does not show where gate ends and up begins (there is no "
                'down_proj that fits it): use gate_up="together", or exclude it'
            )
        # transformers notes at each layer of experts how its weights lie; those of today that take turns all do.
        interleaved = not getattr(layers.get(owner), "is_concatenated", True)
        return gate_up_parts(weight.name, weight.shape, dim=dim, interleaved=interleaved)
    return expert_parts(weight.name, weight.shape)


def _gate_up_dim(shape: tuple[int, ...], down: tuple[int, ...]) -> int | None:
    """Which dimension holds gate and up, told by the projection that takes their product back."""
    if shape[1] == 2 * down[2] and shape[2] == down[1]:
        return 1
    if shape[2] == 2 * down[1] and shape[1] == down[2]:
        return 2
    return None


def _heads(weight: Weight, layers: dict[str, nn.Module]) -> list[Part]:
    owner, _, attribute = weight.name.rpartition(".")
    layer = layers.get(owner)
    if isinstance(layer, nn.MultiheadAttention):
        return _multihead(weight, attribute, layer)
    above, _, projection = owner.rpartition(".")
    if attribute != "weight" or layer is None:
        return []
    if isinstance(layers.get(above), nn.MultiheadAttention):
        return head_parts(weight.name, _two(weight), layers[above].num_heads, dim=1)  # type: ignore[arg-type]
    attention = _attention_of(above, layers)
    width = _width(attention)
    if attention is None or width is None:
        return []
    # transformers' Conv1D, in GPT-2 and its kin, has a column for each output.
    rows = int(type(layer).__name__ == "Conv1D")
    if projection in _QUERY:
        return _blocks(weight, rows, getattr(attention, "qk_head_dim", width))
    if projection in _KEY_VALUE:
        return _blocks(weight, rows, width)
    if projection == "kv_b_proj" and hasattr(attention, "v_head_dim"):
        return _blocks(weight, rows, int(attention.qk_nope_head_dim) + int(attention.v_head_dim))  # type: ignore[arg-type]
    if projection == "c_attn":
        return _blocks(weight, rows, width, kinds=("q", "k", "v"))
    if projection in _OUTPUT:
        return _blocks(weight, 1 - rows, getattr(attention, "v_head_dim", width))
    return []


def _attention_of(name: str, layers: dict[str, nn.Module]) -> nn.Module | None:
    """The layer that knows its heads: the projection's own, or the one beside it, as in BERT."""
    layer = layers.get(name)
    if layer is None or _width(layer) is not None:
        return layer
    above, _, last = name.rpartition(".")
    beside = layers.get(f"{above}.self") or layers.get(f"{above}.attention") if last == "output" else None
    return beside


def _width(attention: nn.Module | None) -> int | None:
    for name in (*_WIDTHS, "v_head_dim"):
        width: Any = getattr(attention, name, None)
        if isinstance(width, int) and width > 0:
            return width
    return None


def _two(weight: Weight) -> tuple[int, int]:
    rows, cols = weight.shape
    return rows, cols


def _blocks(weight: Weight, dim: int, width: Any, kinds: Sequence[str] = ("",)) -> list[Part]:
    size = weight.shape[dim]
    if not isinstance(width, int) or size % (width * len(kinds)):
        return []
    return _kinds(weight, size // width, dim, kinds)


def _kinds(weight: Weight, blocks: int, dim: int, kinds: Sequence[str]) -> list[Part]:
    """Blocks of heads, first all of one kind and then all of the next."""
    heads = blocks // len(kinds)
    return [
        replace(part, label=f"{kinds[place // heads]} head {place % heads}".strip())
        for place, part in enumerate(head_parts(weight.name, _two(weight), blocks, dim=dim))
    ]


def _multihead(weight: Weight, attribute: str, layer: nn.MultiheadAttention) -> list[Part]:
    if attribute == "in_proj_weight":
        return _kinds(weight, 3 * layer.num_heads, 0, ("q", "k", "v"))
    if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return head_parts(weight.name, _two(weight), layer.num_heads)
    return []
