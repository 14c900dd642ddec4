"""How much memory a training takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from typing_extensions import override

MEASURED_BATCHES = 3
"""Batches of which the activations are counted on a CPU; counting costs a little time."""


class PeakMemory(Callback):
    """The memory that tensors take in training, at its peak.

    On a GPU it is the most that PyTorch's allocator measured (``torch.cuda.max_memory_allocated``) in a training step;
    profiles, validation and probes, which come between the steps, do not count.
    On a CPU no allocator counts, and the resident set is that of the whole process, libraries and earlier runs
    included; so it is the sum of all parameters and buffers, their gradients, the optimizer's state, and the most
    that autograd saved for the backward pass of one of the first batches.

    Attributes:
        bytes: the peak, after fit end.
        activations: of it, what autograd saved, if it was counted on a CPU.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.activations = 0
        self._hooks: saved_tensors_hooks | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bytes = self.activations = 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if pl_module.device.type != "cpu" or trainer.current_epoch > 0 or batch_idx >= MEASURED_BATCHES:
            return
        counter = SavedTensors(pl_module.parameters())
        self._counter = counter
        self._hooks = saved_tensors_hooks(counter.pack, counter.unpack)
        self._hooks.__enter__()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._stop_counting()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(pl_module.device))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            return
        held = [*pl_module.parameters(), *pl_module.buffers()]
        gradients = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        states = [t for opt in trainer.optimizers for state in opt.state.values() for t in state.values()]
        self.bytes = sum(map(_size, [*held, *gradients, *(t for t in states if isinstance(t, Tensor))]))
        self.bytes += self.activations

    def _stop_counting(self) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__(None, None, None)
        self._hooks = None
        self.activations = max(self.activations, self._counter.bytes)


class SavedTensors:
    """Counts the memory of what autograd saves for the backward pass, the parameters themselves left out.

    Example:
        >>> import torch
        >>> layer, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
        >>> def saved():
        ...     counter = SavedTensors(layer.parameters())
        ...     with saved_tensors_hooks(counter.pack, counter.unpack):
        ...         layer(x)
        ...     return counter.bytes
        >>> saved()  # the input, for the gradient of the weight
        64
        >>> _ = layer.requires_grad_(False)
        >>> saved()
        0
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved; views of one storage count once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        """The tensor, as it was saved."""
        return tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
