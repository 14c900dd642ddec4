"""Let a module be evaluated and leave it exactly as it was, whatever it keeps."""

from __future__ import annotations

import argparse
import io
import queue
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

# A buffer of numbers that no layer computes with as floats, and larger than this, is a stored weight or a table.
_LARGEST_COPIED_TABLE = 16 << 20


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode without gradients, and leave everything as found afterwards.

    Restored are, also after an exception and even if the code inside calls ``module.train()``:

    - the mode of every submodule, through its own ``train(mode)``, and the weights of layers that change them there
      (LoRA that merges its update for evaluation takes it out again, and with it the rounding);
    - all buffers, and every other attribute of every submodule: tensors, arrays, numbers, generators, the contents of
      lists, deques, tuples, sets and dicts, hooks, the settings in transformers' configurations;
    - the attributes of objects that it keeps, such as meters, but not the Trainer, datasets, loaders, loggers,
      callbacks and optimizers, and nothing that holds a lock, a thread or a file;
    - the state of torchmetrics in the module, also of those in its lists and dicts;
    - ``requires_grad`` and the gradients;
    - the state of every global random number generator.

    Nothing is logged: ``log`` and ``log_dict`` of a LightningModule do nothing inside.

    Args:
        module: what is evaluated.

    Raises:
        RuntimeError: if the code inside changed a weight or a gradient, or a large table of integers, in place, which
            is not copied beforehand; the message names it. Everything else has been restored then.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm.train()(torch.randn(4, 2) + 5)
        >>> norm.training, norm.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    # Lightning validates in inference mode; tensors that a module caches there could not be used in training.
    with _isolated_rng(), _isolate_mps(), torch.inference_mode(False), torch.no_grad():
        kept = _Kept(module)
        try:
            _silence(module)
            module.eval()
            yield
        finally:
            changed = kept.restore()
        # After an exception that one is told.
        if changed:
            raise RuntimeError(
                f"evaluating a probe changed {changed[0]} in place, and it cannot be put back: let the probe's step "
                "leave the module's weights and gradients alone"
            )


def _silence(module: nn.Module) -> None:
    for submodule in module.modules():
        if isinstance(submodule, pl.LightningModule):
            # In the instance, where they come before those of the class; they go with all other new attributes.
            submodule.__dict__["log"] = submodule.__dict__["log_dict"] = _log_nothing


def _log_nothing(*_: Any, **__: Any) -> None:
    """In place of ``LightningModule.log``."""


class _Kept:
    """What a module holds, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modes = {submodule: submodule.training for submodule in module.modules()}
        # FSDP2 exchanges sharded parameters for whole ones while a layer runs, and has an order of its own for that.
        self.gathers = any(isinstance(submodule, FSDPModule) for submodule in module.modules())
        self.undo: list[Callable[[], None]] = []
        self.guarded: list[tuple[str, Tensor, int]] = []
        self._seen: set[int] = set()
        for name, parameter in module.named_parameters():
            self._keep_parameter(name, parameter)
        for prefix, submodule in module.named_modules():
            if _changes_weights_with_its_mode(submodule):
                for parameter in submodule.parameters(recurse=False):
                    self._keep_content(parameter)
            self._keep_attributes(prefix, submodule)

    def restore(self) -> list[str]:
        """Put everything back.

        Returns:
            The names of what was changed in place and has no copy.
        """
        self._restore_modes()
        # The last is undone first: what holds a tensor is put back after the tensor's content.
        with ExitStack() as stack:
            for action in self.undo:
                stack.callback(action)
        return [name for name, tensor, version in self.guarded if _version(tensor) != version]

    def _restore_modes(self) -> None:
        # From the outside in, since train() sets the modes of all submodules, too.
        for submodule, training in self.modes.items():
            if submodule.training != training:
                submodule.train(training)
        for submodule, training in self.modes.items():
            # Such as a backbone whose train() keeps its normalization layers in eval mode.
            if submodule.training != training:
                submodule.training = training

    def _keep_parameter(self, name: str, parameter: nn.Parameter) -> None:
        required, gradient = parameter.requires_grad, parameter.grad

        def undo() -> None:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not gradient:
                parameter.grad = gradient

        self.undo.append(undo)
        self.guarded.append((name, parameter, _version(parameter)))
        if gradient is not None:
            self.guarded.append((f"the gradient of {name}", gradient, _version(gradient)))

    def _keep_attributes(self, prefix: str, submodule: nn.Module) -> None:
        attributes = submodule.__dict__
        before = dict(attributes)

        def undo() -> None:
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            for name, value in before.items():
                if name != "training" and attributes.get(name, undo) is not value:
                    attributes[name] = value

        for name, value in before.items():
            if name == "_parameters" and self.gathers:
                continue
            self._keep_value(f"{prefix}.{name}" if prefix else name, value)
        self.undo.append(undo)

    def _keep_value(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, nn.Parameter | nn.Module) and not isinstance(value, Metric):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            table = not value.is_floating_point() and not value.is_complex()
            if table and value.nbytes > _LARGEST_COPIED_TABLE:
                self.guarded.append((name, value, _version(value)))
            else:
                self._keep_content(value)
        elif isinstance(value, Metric):
            self._keep_attributes(name, value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self.undo.append(lambda: _set_state(value, state))
        elif isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
            self._keep_generator(value)
        elif isinstance(value, np.ndarray):
            self._keep_array(value)
        elif isinstance(value, list | deque | tuple | frozenset):
            items = list(value)
            for item in items:
                self._keep_value(name, item)
            if isinstance(value, list | deque):
                self.undo.append(lambda: _set_items(value, items))
        elif isinstance(value, dict):
            entries = dict(value)
            for key, entry in entries.items():
                self._keep_value(f"{name}.{key}", entry)
            self.undo.append(lambda: _set_entries(value, entries))
        elif isinstance(value, set):
            members = set(value)
            self.undo.append(lambda: _set_members(value, members))
        elif _is_object(value):
            attributes = vars(value)
            if not _is_configuration(value):  # whose settings are replaced, never changed in place
                for attribute, entry in list(attributes.items()):
                    self._keep_value(f"{name}.{attribute}", entry)
            settings = dict(attributes)
            self.undo.append(lambda: _set_entries(attributes, settings))

    def _keep_generator(self, generator: np.random.Generator | np.random.RandomState | random.Random) -> None:
        if isinstance(generator, random.Random):
            drawn = generator.getstate()
            self.undo.append(lambda: generator.setstate(drawn))
        elif isinstance(generator, np.random.RandomState):
            state = generator.get_state()
            self.undo.append(lambda: generator.set_state(state))
        else:
            bits = generator.bit_generator
            counted = bits.state
            self.undo.append(lambda: setattr(bits, "state", counted))

    def _keep_array(self, array: np.ndarray[Any, Any]) -> None:
        # One in a file is a dataset.
        if array.flags.writeable and not isinstance(array, np.memmap):
            copied = array.copy()

            def undo() -> None:
                array[...] = copied

            self.undo.append(undo)

    def _keep_content(self, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.is_inference():
            return
        copied = tensor.detach().clone()

        def undo() -> None:
            # Not by the version, which batch normalization does not count up when it moves its statistics.
            if not torch.equal(tensor.detach(), copied):
                tensor.detach().copy_(copied)

        self.undo.append(undo)
        self.guarded = [entry for entry in self.guarded if entry[1] is not tensor]


def _changes_weights_with_its_mode(submodule: nn.Module) -> bool:
    """Whether a layer has a ``train()`` of its own, in which LoRA merges and unmerges its update."""
    own = type(submodule).train is not nn.Module.train or "train" in submodule.__dict__
    return own and not isinstance(submodule, pl.LightningModule | Metric)


def _is_configuration(value: Any) -> bool:
    """Whether it is one of transformers' configurations, which a generating step may change."""
    kind = type(value)
    return kind.__name__.endswith("Config") and kind.__module__.partition(".")[0] == "transformers"


# What has a life of its own beside the module, or holds the data.
_APART = (pl.Trainer, pl.LightningDataModule, pl.Callback, Logger, Dataset, DataLoader, Optimizer, LRScheduler)
_BARE = (types.SimpleNamespace, argparse.Namespace)


def _is_object(value: Any) -> bool:
    """Whether it is an object with attributes that the module keeps for itself, such as a meter."""
    if _is_configuration(value) or type(value) in _BARE:
        return True
    if isinstance(value, type) or not hasattr(value, "__dict__") or isinstance(value, _APART):
        return False
    if any(isinstance(held, _SHARED) for held in vars(value).values()):
        return False
    package = type(value).__module__.partition(".")[0]
    # A script's own classes are in __main__, which counts as one of Python's modules.
    return package == "__main__" or package not in {*sys.stdlib_module_names, *_MACHINERY}


# What holds one of these is at work beside the run, such as a writer or a connection.
_SHARED = (threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Event, queue.Queue, io.IOBase)
_MACHINERY = frozenset(
    {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities"}
    | {"wandb", "mlflow", "neptune", "comet_ml", "clearml", "aim", "tensorboardX"}
)


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no changes, and can have none outside of it.
    return 0 if tensor.is_inference() else tensor._version


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _set_items(kept: list[Any] | deque[Any], items: list[Any]) -> None:
    if len(kept) != len(items) or any(now is not before for now, before in zip(kept, items, strict=True)):
        kept.clear()
        kept.extend(items)


def _set_entries(kept: dict[Any, Any], entries: Mapping[Any, Any]) -> None:
    if list(kept) != list(entries) or any(kept[key] is not entry for key, entry in entries.items()):
        kept.clear()
        kept.update(entries)


def _set_members(kept: set[Any], members: set[Any]) -> None:
    if kept != members:
        kept.clear()
        kept.update(members)


@contextmanager
def _isolated_rng() -> Iterator[None]:
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        # Without the error, at which it would leave the random numbers as they are.
        isolation.__exit__(None, None, None)


@contextmanager
def _isolate_mps() -> Iterator[None]:
    if not torch.backends.mps.is_available():
        yield
        return
    state = torch.mps.get_rng_state()
    try:
        yield
    finally:
        torch.mps.set_rng_state(state)
