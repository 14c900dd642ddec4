"""A whole measurement by gradients: the task's batches and the reference through one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.probes.inputs import GeneratedText, ReferenceInputs, resolve_reference
from kappa_lightning.processes import Processes
from kappa_lightning.restoring import modes_restored
from kappa_lightning.sensitivity.fisher import sensitivities
from kappa_lightning.sensitivity.gradients import differentiating
from kappa_lightning.sensitivity.row import SensitivityRow
from kappa_lightning.sensitivity.settings import SensitivitySettings
from kappa_lightning.sensitivity.signal import signals
from kappa_lightning.weights import Weight

Loss = Callable[[Any, Any], Tensor]
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: from a description and a number of steps to a context that yields what counts them."""


def measure(
    module: nn.Module,
    weights: Sequence[Weight],
    batches: Sequence[Any],
    loss: Loss,
    *,
    reference: Any = "auto",
    optimizer: str = "adam",
    draws: int = 1,
    seed: int = 0,
    to_device: Callable[[Any], Any] | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    processes: Processes | None = None,
    watch: Watch | None = None,
) -> tuple[list[SensitivityRow], SensitivitySettings]:
    """Signal and sensitivity of some weights, by gradients alone.

    The module is afterwards as it was, bit for bit: weights (which no step moves), gradients, buffers, modes, what else
    its submodules keep, and all random numbers. Beyond the model and what a step of training needs for one batch, it
    takes the memory of one gradient of the candidates.

    Args:
        module: the pretrained model, in the modes in which it will train.
        weights: the candidates; each requires a gradient.
        batches: of the new task. Several processes are given the same ones and share them.
        loss: ``loss(module, batch)``, a scalar.
        reference: see :meth:`~kappa_lightning.sensitivity.SensitivityProfile.from_model`.
        optimizer: ``"adam"`` or ``"sgd"``.
        draws: of labels for each batch of the reference.
        seed: of what is drawn.
        to_device: brings a batch to the module; by default, to where its first parameter is.
        precision: the context of a forward pass, such as autocast.
        processes: who shares the batches, each with the whole module; only this one if ``None``, which is right for
            processes that must run every forward pass together, too (FSDP2).
        watch: a progress bar.

    Raises:
        TypeError: if what the model says cannot be told.
        ValueError: if there is no batch, or a loss is no finite scalar.
    """
    together = processes or Processes()
    place = to_device or _mover(module)
    show = watch or _silent
    asked = resolve_reference(reference, module)
    mine = slice(together.rank, None, together.world_size)

    def outputs(prepared: Any, tick: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
        for number, batch in islice(enumerate(prepared), mine.start, None, mine.step):

            def output(batch: Any = batch) -> Any:
                with precision():
                    return asked.distribution(module, place(batch))

            yield number, output
            tick(1)

    def losses(tick: Callable[[int], None]) -> Iterator[Callable[[], Tensor]]:
        for number, batch in islice(enumerate(batches), mine.start, None, mine.step):

            def step(batch: Any = batch, number: int = number) -> Tensor:
                # Dropout draws the same whichever process has the batch.
                torch.manual_seed(seed * 1_000_003 + number)
                with precision():
                    return loss(module, place(batch))

            yield step
            tick(1)

    with differentiating(module, weights):
        with show("Signal", math.ceil(len(batches) / together.world_size)) as tick:
            signal = signals(weights, losses(tick), optimizer, processes=together)
        with modes_restored(module):
            module.eval()
            written = steps_of(asked)
            with (show if written else _silent)("Generating text", written) as tick:
                prepared = asked.prepare(module, map(place, batches), watch=tick)
            total = len(prepared) * draws if isinstance(prepared, Sized) else 0
            with show("Sensitivity", math.ceil(total / together.world_size)) as tick:
                sensitivity, rows = sensitivities(
                    weights, outputs(prepared, tick), draws=draws, seed=seed, processes=together
                )
    settings = SensitivitySettings(optimizer, "gradient", str(asked), len(batches), rows, seed)
    return [_row(weight, signal[weight.name], sensitivity[weight.name]) for weight in weights], settings


def steps_of(reference: ReferenceInputs) -> int:
    """How many steps a progress bar of generating counts."""
    if not isinstance(reference, GeneratedText):
        return 0
    return math.ceil(reference.num_sequences / max(reference.batch_size, 16)) * (reference.num_tokens - 1)


def _row(weight: Weight, signal: float, sensitivity: float) -> SensitivityRow:
    count = math.prod(weight.shape)
    if weight.part is None and weight.is_made:
        count = sum(parameter.numel() for parameter in weight.parameters)
    dtype = str(weight.dtype).removeprefix("torch.")
    content = fingerprint(weight.read())
    return SensitivityRow(weight.name, weight.shape, signal, sensitivity, count, dtype, content)


def _mover(module: nn.Module) -> Callable[[Any], Any]:
    device = next(module.parameters()).device

    def move(batch: Any) -> Any:
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)

    return move


@contextmanager
def _silent(description: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda steps: None
