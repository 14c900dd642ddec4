"""Contexts that put something back as it was: random numbers, modes, what a module keeps, gradients."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, OrderedDict)


@contextmanager
def random_numbers_restored() -> Iterator[None]:
    """The generators of torch on every device, of NumPy and of Python go on as if the block had not been.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with random_numbers_restored():
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    cpu, numpy_state, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    # Asking makes no context on a GPU that nobody uses.
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python)


@contextmanager
def environment_restored(*names: str) -> Iterator[None]:
    """Environment variables have the values that they had, or none: ``seed_everything`` sets some."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a ``KeyboardInterrupt``: Lightning makes it an exit and leaves the signal ignored from then on."""
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if here and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Every submodule is in training or eval mode afterwards as it was before."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextmanager
def gradients_restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters have no gradients in the block, and afterwards those from before."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """What the submodules keep beside their parameters is afterwards what it was before.

    Buffers and other tensors (running statistics, the state of a torchmetrics ``Metric``) get their values back, lists,
    dictionaries and sets their entries, and every other attribute the object that it was. Objects of other kinds that
    are changed in place stay changed.
    """
    kept = [_Kept(submodule) for submodule in module.modules()]
    try:
        yield
    finally:
        for each in kept:
            each.restore()


def put_back(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor in place, also into one that Lightning's validation made in inference mode."""
    with torch.inference_mode(torch.is_inference_mode_enabled() or tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


class _Kept:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        # What nn.Module keeps is gone into by itself; parameters are for whoever changes them.
        inner = ("_parameters", "_modules")
        self.buffers = dict(module._buffers)
        values = [*(value for key, value in self.attributes.items() if key not in (*inner, "_buffers"))]
        tensors = [*self.buffers.values(), *values, *(v for c in values for v in _entries(c))]
        self.tensors = [
            (tensor, tensor.detach().clone())
            for tensor in tensors
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        ]
        self.containers = [(value, _copy(value)) for value in values if isinstance(value, _CONTAINERS)]

    def restore(self) -> None:
        state = vars(self.module)
        for key in state.keys() - self.attributes.keys():
            del state[key]
        state.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        for tensor, value in self.tensors:
            put_back(tensor, value)
        for container, copy in self.containers:
            container.clear()
            container.extend(copy) if isinstance(container, list | deque) else container.update(copy)


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple | set | deque) else ()


def _copy(container: Any) -> Any:
    return list(container) if isinstance(container, deque) else container.copy()
