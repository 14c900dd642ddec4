"""Everything that a module keeps, to be put back after an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from kappa_lightning.evaluation.values import (
    UNCHANGEABLE,
    Undo,
    inside,
    is_iterator,
    is_own,
    set_entries,
    stand_in,
    undo_of,
)
from kappa_lightning.weights.sharded import is_sharded

# A buffer of numbers that no layer computes with as floats, and larger than this, is a stored weight or a table.
_LARGEST_COPIED_TABLE = 16 << 20


class Kept:
    """What a module holds, to be put back.

    Iterators of the module are exchanged for stand-ins until then.

    Args:
        module: what is evaluated.
        moved: parameters whose content somebody else puts back.
    """

    def __init__(self, module: nn.Module, moved: Collection[nn.Parameter] = ()) -> None:
        self.module = module
        # FSDP2 exchanges sharded parameters for whole ones while a layer runs, and has an order of its own for that.
        self.gathers = any(isinstance(submodule, FSDPModule) for submodule in module.modules())
        self._modes: dict[nn.Module, bool] = {}
        self._undo: list[Undo] = []
        self._guarded: list[_Guard] = []
        self._exchanges: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        # Identities are only those of what is alive.
        self._alive: list[Any] = []
        self._moved = {id(parameter) for parameter in moved}
        self._keep_module("", module)
        for exchange in self._exchanges:
            exchange()

    def restore(self) -> list[str]:
        """Put everything back.

        Returns:
            The names of what was changed in place and has no copy.
        """
        self._restore_modes()
        # The last is undone first: what holds a tensor is put back after the tensor's content.
        with ExitStack() as stack:
            for action in self._undo:
                stack.callback(action)
        return [guard.name for guard in self._guarded if guard.is_changed()]

    def _restore_modes(self) -> None:
        # From the outside in, since train() sets the modes of all submodules, too.
        for submodule, training in self._modes.items():
            if submodule.training != training:
                submodule.train(training)
        for submodule, training in self._modes.items():
            # Such as a backbone whose train() keeps its normalization layers in eval mode.
            if submodule.training != training:
                submodule.training = training

    def _keep_module(self, prefix: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        modules = [(name, each) for name, each in module.named_modules(prefix=prefix) if id(each) not in self._seen]
        for _, submodule in modules:
            self._seen.add(id(submodule))
            self._modes[submodule] = submodule.training
        for name, parameter in module.named_parameters(prefix=prefix):
            self._keep_parameter(name, parameter)
        for name, submodule in modules:
            if _changes_weights_with_its_mode(submodule):
                for parameter in submodule.parameters(recurse=False):
                    self._keep_content(parameter)
            if isinstance(submodule, torch.jit.ScriptModule):
                self._keep_script(name, submodule)
            self._keep_attributes(name, submodule)

    def _keep_parameter(self, name: str, parameter: nn.Parameter) -> None:
        if id(parameter) in self._seen:
            return
        self._seen.add(id(parameter))
        required, gradient = parameter.requires_grad, parameter.grad
        own = dict(vars(parameter))
        # Memory of another size, type or place: what half() or to() exchanges it for.
        memory = parameter.data if not self.gathers and _has_memory_of_its_own(parameter) else None

        def undo() -> None:
            if memory is not None and not _is_same_memory(parameter, memory):
                parameter.data = memory
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not gradient:
                parameter.grad = gradient
            set_entries(vars(parameter), own)

        self._undo.append(undo)
        if id(parameter) not in self._moved:
            self._guarded.append(_Guard(name, parameter))
        if gradient is not None:
            self._guarded.append(_Guard(f"the gradient of {name}", gradient))

    def _keep_script(self, prefix: str, submodule: torch.jit.ScriptModule) -> None:
        """The attributes and buffers of a scripted module, which are no Python attributes."""
        for name in submodule._concrete_type.get_attributes():  # which has no public name
            if name == "training":
                continue
            value = getattr(submodule, name)
            if isinstance(value, Tensor):
                self._keep_value(f"{prefix}.{name}" if prefix else name, value)
            # Numbers, texts and lists of them come as copies.
            self._undo.append(partial(_set_in_script, submodule, name, value))

    def _keep_attributes(self, prefix: str, submodule: nn.Module) -> None:
        attributes, kind = submodule.__dict__, type(submodule)
        before = dict(attributes)

        def undo() -> None:
            if type(submodule) is not kind:
                submodule.__class__ = kind  # registering a parametrization exchanges it
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            for name, value in before.items():
                if name != "training" and attributes.get(name, undo) is not value:
                    attributes[name] = value

        for name, value in before.items():
            # What a LightningModule calls its Trainer, and what FSDP2 sees to itself.
            if name in ("_trainer", "_fabric") or (name == "_parameters" and self.gathers):
                continue
            self._keep_value(f"{prefix}.{name}" if prefix else name, value, partial(attributes.__setitem__, name))
        self._undo.append(undo)
        for kin in kind.__mro__:
            if is_own(kin) and kin.__module__.partition(".")[0] not in ("transformers", "peft", "torchmetrics"):
                self._keep_class(kin)

    def _keep_class(self, kind: type) -> None:
        """What a class of the script's holds for all of its instances, such as a counter."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        before = {name: value for name, value in vars(kind).items() if not name.startswith("__") and _is_data(value)}

        def undo() -> None:
            for name in [n for n, value in vars(kind).items() if not n.startswith("__") and _is_data(value)]:
                if name not in before:
                    delattr(kind, name)
            for name, value in before.items():
                if vars(kind).get(name, undo) is not value:
                    setattr(kind, name, value)

        for name, value in before.items():
            self._keep_value(f"{kind.__name__}.{name}", value)
        self._undo.append(undo)

    def _keep_value(self, name: str, value: Any, exchange: Callable[[Any], None] | None = None) -> None:
        if type(value) in UNCHANGEABLE or id(value) in self._seen:
            return
        if isinstance(value, nn.Parameter):
            self._keep_parameter(name, value)
            return
        if isinstance(value, nn.Module) and not isinstance(value, Metric):
            # Hidden in a list, or from the optimizers.
            self._keep_module(name, value)
            return
        self._seen.add(id(value))
        self._alive.append(value)
        if isinstance(value, Tensor):
            table = not value.is_floating_point() and not value.is_complex()
            if table and value.nbytes > _LARGEST_COPIED_TABLE:
                self._guarded.append(_Guard(name, value))
            else:
                self._keep_content(value)
        elif isinstance(value, Metric):
            self._keep_attributes(name, value)
        elif is_iterator(value):
            if exchange is not None:
                self._exchanges.append(partial(exchange, stand_in(name, value)))
        else:
            if type(value) is tuple and exchange is not None and any(map(is_iterator, value)):
                stand_ins = tuple(stand_in(name, item) if is_iterator(item) else item for item in value)
                self._exchanges.append(partial(exchange, stand_ins))
            for ending, held, change in inside(value):
                self._keep_value(name + ending, held, change)
            undo = undo_of(value)
            if undo is not None:
                self._undo.append(undo)

    def _keep_content(self, tensor: Tensor) -> None:
        if _has_no_memory(tensor) or tensor.is_inference():
            return
        copied, required = tensor.detach().clone(), tensor.requires_grad
        memory = tensor.data if _has_memory_of_its_own(tensor) else None

        def undo() -> None:
            if memory is not None and not _is_same_memory(tensor, memory):
                tensor.data = memory
            # Not by the version, which batch normalization does not count up when it moves its statistics.
            if not torch.equal(tensor.detach(), copied):
                tensor.detach().copy_(copied)
            if tensor.is_leaf and tensor.requires_grad != required:
                tensor.requires_grad_(required)

        self._undo.append(undo)
        self._guarded = [guard for guard in self._guarded if guard.tensor is not tensor]


class _Guard:
    """A tensor of which there is no copy, and how to see that it has changed."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.version, self.sum = _version(tensor), _sum_of_bits(tensor)

    def is_changed(self) -> bool:
        """Whether it was changed in place, through ``.data`` too, which counts no version."""
        if _version(self.tensor) != self.version:
            return True
        now = _sum_of_bits(self.tensor)
        return now is not None and self.sum is not None and bool(now != self.sum)


def _sum_of_bits(tensor: Tensor) -> Tensor | None:
    """The sum of a tensor's bits, read as integers; ``None`` if they cannot be read."""
    if is_sharded(tensor):
        tensor = tensor.to_local()
    if not _has_memory_of_its_own(tensor) or tensor.numel() == 0:
        return None
    if tensor.untyped_storage().nbytes() == 0:
        return None  # a whole parameter of FSDP2, whose memory is freed when its layer has run
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.nbytes % 8 == 0:
        return tensor.view(-1).view(torch.int64).sum()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if integers is None:
        return None
    return tensor.view(integers).sum(dtype=torch.int64)


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no changes, and can have none outside of it.
    return 0 if tensor.is_inference() else tensor._version


def _has_no_memory(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.layout != torch.strided or nn.parameter.is_lazy(tensor)


def _has_memory_of_its_own(tensor: Tensor) -> bool:
    """Whether it is no wrapper around other tensors, such as a sharded or a quantized one."""
    plain = type(tensor) is Tensor or (isinstance(tensor, nn.Parameter) and type(tensor.data) is Tensor)
    return plain and not _has_no_memory(tensor)


def _is_same_memory(tensor: Tensor, memory: Tensor) -> bool:
    return (
        tensor.dtype == memory.dtype
        and tensor.device == memory.device
        and tensor.shape == memory.shape
        and tensor.stride() == memory.stride()
        and tensor.data_ptr() == memory.data_ptr()
    )


def _changes_weights_with_its_mode(submodule: nn.Module) -> bool:
    """Whether a layer has a ``train()`` of its own, in which LoRA merges and unmerges its update."""
    own = type(submodule).train is not nn.Module.train or "train" in submodule.__dict__
    return own and not isinstance(submodule, pl.LightningModule | Metric | torch.jit.ScriptModule)


def _is_data(value: Any) -> bool:
    """Whether an attribute of a class is neither a method nor a property."""
    return not callable(value) and not hasattr(type(value), "__get__")


def _set_in_script(submodule: torch.jit.ScriptModule, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if getattr(submodule, name).data_ptr() == value.data_ptr():
            return
    elif getattr(submodule, name) == value:
        return
    setattr(submodule, name, value)
