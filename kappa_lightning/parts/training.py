"""Let parts of parameters train: the module keeps its names, shapes and memory, and gets a parameter for each part."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kappa_lightning.parts.join import join
from kappa_lightning.parts.sharded import ShardedParts, has_one_shard, is_fully_sharded
from kappa_lightning.weights.part import Index, Part
from kappa_lightning.weights.quantized import is_quantized
from kappa_lightning.weights.sharded import is_sharded, reshard

_HELD = "_kappa_parts"


class PartialTraining:
    """Parameters of a module of which parts train; made by :func:`train_parts`.

    Attributes:
        parameters: the trainable parameter of each part by its name, in the order in which they were given.
        indices: for the name of each parameter of which parts train where these lie.
    """

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.indices: dict[str, list[Index]] = {}
        self._layers: list[nn.Module] = []
        reshard(module)
        owners = _owners(module)
        gathered = _gathered_by_fsdp(module)
        # Everything is looked at before anything is changed.
        for part in parts:
            layer_of_part, attribute = owners.get(part.parameter, (None, ""))
            _check(part, layer_of_part, attribute, is_gathered=id(layer_of_part) in gathered)
        by_layer: dict[tuple[int, str], list[Part]] = {}
        for part in parts:
            layer, attribute = owners[part.parameter]
            by_layer.setdefault((id(layer), attribute), []).append(part)
        for (_, attribute), group in by_layer.items():
            layer, _ = owners[group[0].parameter]
            if _HELD in layer.__dict__ and attribute in layer.__dict__[_HELD].indices:
                raise ValueError(f"parts of {group[0].parameter} train already: undo that first")
            _require_disjoint(cast(Tensor, layer._parameters[attribute]).shape, group)
        for (_, attribute), group in by_layer.items():
            layer, _ = owners[group[0].parameter]
            _hold(layer).split(attribute, group)
            if layer not in self._layers:
                self._layers.append(layer)
        for part in parts:
            layer, attribute = owners[part.parameter]
            self.parameters[part.name] = cast(nn.Parameter, layer._parameters[f"{attribute}[{part.label}]"])
            self.indices.setdefault(part.parameter, []).append(part.index)

    def store(self) -> None:
        """Put the parts' values into their wholes where FSDP2 shards them; elsewhere they are there already.

        To be called by all processes together, after each step of the optimizer and whenever something else has written
        to parts.
        """
        for layer in self._layers:
            _hold(layer).store()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave the module its own parameters alone, for code that pairs them with a copy's; it cannot run so."""
        parts = [(layer, {name: layer._parameters.pop(name) for name in _hold(layer).names}) for layer in self._layers]
        try:
            yield
        finally:
            for layer, members in parts:
                layer._parameters.update(members)

    def undo(self) -> None:
        """Make the module as it was, with the weights as they are now; the whole parameters' ``requires_grad``, too."""
        for layer in self._layers:
            _hold(layer).undo()
        self._layers.clear()
        self.parameters.clear()
        self.indices.clear()


def train_parts(module: nn.Module, parts: Iterable[Part]) -> PartialTraining:
    """Let parts of parameters train and freeze the rest of those parameters.

    Each part becomes an ``nn.Parameter`` beside the whole, named ``<parameter>[<label>]``, that lies in the whole's
    memory: no weight is copied, gradients and an optimizer's state exist for the parts alone, and the rest cannot be
    moved by weight decay, momentum, clipping or averaging, since no optimizer has it. ``state_dict()`` and
    ``save_pretrained`` keep the names and shapes that they had.

    A copy of the module has parts of its own. A moving average must not be taken of both, the whole and its parts
    (``AveragedModel`` would average the parts twice): take it of the ``state_dict``, or under
    :meth:`PartialTraining.hidden`, as the freeze callbacks have Lightning's averaging callbacks do it.

    What remains is the transient gradient of the whole tensor in the backward pass of its layer.

    Under FSDP2 (``fully_shard``) a part is sharded by itself, evenly over the processes, beside the whole:
    :meth:`PartialTraining.store` must follow each step of an optimizer, which the freeze callbacks see to.

    Args:
        module: has the parameters, which may be tied.
        parts: which parts train; parts of one parameter must not overlap.

    Raises:
        TypeError: if a parameter is quantized, or not of floats.
        ValueError: if a parameter is missing, parametrized, split by tensor parallelism, lazy or on the meta device, or
            if parts overlap or lie outside of it. Nothing has been changed then.

    Example:
        >>> import torch
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.down = torch.nn.Parameter(torch.ones(3, 2, 2))
        ...     def forward(self, x):
        ...         return torch.einsum("eij,j->ei", self.down, x)
        >>> experts = Experts()
        >>> training = train_parts(experts, [Part("down", "1", (1,))])
        >>> experts(torch.ones(2)).sum().backward()
        >>> {name: None if p.grad is None else p.grad.tolist() for name, p in experts.named_parameters()}
        {'down': None, 'down[1]': [[1.0, 1.0], [1.0, 1.0]]}
        >>> list(experts.state_dict())
        ['down']
    """
    return PartialTraining(module, list(parts))


def store_parts(module: nn.Module) -> None:
    """:meth:`PartialTraining.store` for all parts of a module, however they came to train."""
    for layer in module.modules():
        if _HELD in layer.__dict__:
            _hold(layer).store()


def divided(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the layers in which parts train, wholes and parts."""
    return [p for layer in module.modules() if _HELD in layer.__dict__ for p in layer.parameters(recurse=False)]


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The layer and the attribute behind every name, those of tied parameters and of compiled modules included."""
    owners = {}
    for prefix, layer in module.named_modules():
        for attribute, parameter in layer._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                owners[name] = owners[name.replace("_orig_mod.", "")] = (layer, attribute)
    return owners


def _gathered_by_fsdp(module: nn.Module) -> set[int]:
    """The ``id`` of each layer that FSDP2 gathers, by itself or with one around it."""
    return {id(layer) for around in module.modules() if is_fully_sharded(around) for layer in around.modules()}


def _check(part: Part, layer: nn.Module | None, attribute: str, *, is_gathered: bool) -> None:
    if layer is None:
        raise ValueError(f"{part.name}: the module has no parameter {part.parameter}")
    whole = layer._parameters[attribute]
    assert whole is not None
    if isinstance(whole, UninitializedParameter) or whole.is_meta:
        raise ValueError(f"{part.parameter} has no values yet: load or initialize it before parts of it are chosen")
    if is_sharded(whole) and not (is_gathered and has_one_shard(whole)):
        raise ValueError(
            f"{part.parameter} is split by tensor parallelism ({whole.placements}), in which no layer ever sees the "
            "whole of it, so no part of it can be trained alone: use FSDP2 (fully_shard) without tensor parallelism, "
            "DDP or one device, or choose whole tensors"
        )
    if is_quantized(whole) or not whole.is_floating_point():
        raise TypeError(f"{part.parameter} is stored as {whole.dtype}, of which no part can train: choose an adapter")
    if len(part.index) > whole.ndim:
        raise ValueError(f"{part.name} has an index of {len(part.index)} dimensions for a tensor of {whole.ndim}")
    for size, entries in zip(whole.shape, part.index, strict=False):
        if isinstance(entries, int):
            inside = -size <= entries < size
        else:
            inside = len(range(size)[entries]) > 0 and (entries.stop is None or entries.stop <= size)
        if not inside:
            raise ValueError(f"{part.name} lies outside of {part.parameter}, whose shape is {tuple(whole.shape)}")


def _require_disjoint(shape: Sequence[int], parts: Sequence[Part]) -> None:
    for first, second in combinations(parts, 2):
        if _overlap(shape, first.index, second.index):
            raise ValueError(f"{first.name} and {second.name} have entries in common: choose one of the two")


def _overlap(shape: Sequence[int], first: Index, second: Index) -> bool:
    for size, one, other in zip(shape, first, second, strict=False):
        if isinstance(one, int) and isinstance(other, int):
            if one % size != other % size:
                return False
        elif set(_entries(size, one)).isdisjoint(_entries(size, other)):
            return False
    return True


def _entries(size: int, index: int | slice) -> range:
    return range(size)[index] if isinstance(index, slice) else range(index % size, index % size + 1)


class _Held:
    """What a layer's split parameters are made of."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.plain = type(layer)
        self.indices: dict[str, dict[str, Index]] = {}
        self.required: dict[str, bool] = {}
        self.joined: dict[str, Tensor] = {}
        self.shards: dict[str, ShardedParts] = {}
        # FSDP2 gathers in a hook of its own, which has to come first.
        is_first = not any(is_sharded(parameter) for parameter in layer._parameters.values() if parameter is not None)
        self.hooks = [
            layer.register_forward_pre_hook(self._enter, prepend=is_first),
            layer.register_forward_hook(self._leave, always_call=True),
        ]
        _swap_class(layer, self.plain, ())

    @property
    def names(self) -> list[str]:
        """The parts' names in the layer."""
        return [name for indices in self.indices.values() for name in indices]

    def _enter(self, *_: Any) -> None:
        # An expert layer reads its weight once for each expert; joined once, the gradients of all are added up first.
        self.joined = {}
        self.joined = {attribute: self.value(attribute) for attribute in self.indices}

    def _leave(self, *_: Any) -> None:
        self.joined = {}

    def split(self, attribute: str, parts: Sequence[Part]) -> None:
        whole = self.layer._parameters[attribute]
        assert whole is not None
        self.required[attribute] = whole.requires_grad
        whole.requires_grad_(False)
        whole.grad = None
        self.indices[attribute] = {f"{attribute}[{part.label}]": part.index for part in parts}
        if is_sharded(whole):
            self.shards[attribute] = ShardedParts(whole, self.indices[attribute])
            self.layer._parameters.update(self.shards[attribute].parts)
        else:
            for name, index in self.indices[attribute].items():
                self.layer._parameters[name] = nn.Parameter(whole.detach()[index])
        _swap_class(self.layer, self.plain, self.indices)

    def value(self, attribute: str) -> Tensor:
        """The parameter as the layer sees it."""
        whole = self.layer._parameters[attribute]
        assert whole is not None
        known = self.joined.get(attribute)
        if known is not None:
            return known
        indices = self.indices[attribute]
        parts = [cast(Tensor, self.layer._parameters[name]) for name in indices]
        if attribute in self.shards:
            if is_sharded(whole) or not torch.is_grad_enabled():
                return whole
            return cast(Tensor, join(whole, list(indices.values()), parts, self.shards[attribute].reduce))
        if any(not _lies_in(part, whole[index]) for part, index in zip(parts, indices.values(), strict=True)):
            # Somebody has put other values in their place, as torch.func.functional_call does.
            joined = whole.clone()
            for part, index in zip(parts, indices.values(), strict=True):
                joined[index] = part
            return joined
        return whole if not torch.is_grad_enabled() else cast(Tensor, join(whole, list(indices.values()), parts))

    def share_memory_again(self) -> None:
        """After a move to another device or precision, which gives every parameter memory of its own."""
        for attribute, indices in self.indices.items():
            whole = self.layer._parameters[attribute]
            assert whole is not None
            if attribute in self.shards:
                parts = {name: cast(nn.Parameter, self.layer._parameters[name]) for name in indices}
                self.shards[attribute].moved(cast(Any, whole), parts)
                continue
            for name, index in indices.items():
                part = self.layer._parameters[name]
                assert part is not None
                part.data = whole.detach()[index]

    def store(self) -> None:
        for shards in self.shards.values():
            shards.store()

    def load(self, keys: Iterable[str]) -> None:
        """The whole parameters of these names have new values."""
        for attribute in self.shards.keys() & set(keys):
            self.shards[attribute].load()

    def undo(self) -> None:
        for attribute, indices in self.indices.items():
            for name in indices:
                del self.layer._parameters[name]
            whole = self.shards[attribute].whole if attribute in self.shards else self.layer._parameters[attribute]
            assert whole is not None
            whole.requires_grad_(self.required[attribute])
        for hook in self.hooks:
            hook.remove()
        self.layer.__class__ = self.plain
        del self.layer.__dict__[_HELD]


def _lies_in(part: Tensor, entries: Tensor) -> bool:
    return part.data_ptr() == entries.data_ptr() and part.stride() == entries.stride()


def _hold(layer: nn.Module) -> _Held:
    held: _Held | None = layer.__dict__.get(_HELD)
    if held is None:
        held = _Held(layer)
        layer.__dict__[_HELD] = held
    return held


def _property(attribute: str) -> property:
    def get(self: nn.Module) -> Tensor:
        held: _Held = self.__dict__[_HELD]
        return held.value(attribute)

    return property(get)


class _Split:
    """What a layer of which parts train does otherwise than its own class; mixed into it."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        held: _Held = self.__dict__[_HELD]
        # The whole has their entries.
        for name in held.names:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **named: Any) -> None:
        parameters: dict[str, Any] = self.__dict__["_parameters"]
        held: _Held = self.__dict__[_HELD]
        parts = {name: parameters.pop(name) for name in held.names if name in parameters}
        try:
            super()._load_from_state_dict(state_dict, prefix, *arguments, **named)  # type: ignore[misc]
        finally:
            parameters.update(parts)
        held.load(attribute for attribute in held.indices if prefix + attribute in state_dict)

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, Any]]:
        # Lightning loads a checkpoint into a sharded module parameter by parameter, and stops at what it has not.
        caller = sys._getframe(1)
        hides = caller.f_code.co_name == "_named_parameters_and_buffers_to_load"
        held: _Held = self.__dict__[_HELD]
        hidden = held.names if hides else []
        for name, parameter in super().named_parameters(*arguments, **named):  # type: ignore[misc]
            if name not in hidden:
                yield name, parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        held: _Held = self.__dict__[_HELD]
        held.share_memory_again()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        # A copied parameter has memory of its own.
        copied.__dict__[_HELD].share_memory_again()
        return copied


def _swap_class(layer: nn.Module, plain: type[nn.Module], attributes: Iterable[str]) -> None:
    """Give a layer a class of its own, since only a class can have a property; its name stays."""
    members: dict[str, Any] = {attribute: _property(attribute) for attribute in attributes}
    members["__reduce__"] = _refuse_pickle
    layer.__class__ = type(plain.__name__, (_Split, plain), members)


def _refuse_pickle(layer: nn.Module) -> Any:
    raise TypeError(
        f"a {type(layer).__name__} of which single parts train cannot be pickled: save its state_dict, or undo the "
        "partial training (callback.unfreeze()) first"
    )
