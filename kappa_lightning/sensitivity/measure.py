"""A whole measurement: the task's batches and the reference through one module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from kappa_lightning.probes.inputs import GeneratedText, ReferenceInputs
from kappa_lightning.probes.resolving import resolve_reference
from kappa_lightning.probes.synthesized import SynthesizedInputs
from kappa_lightning.processes import Processes
from kappa_lightning.restoring import modes_restored
from kappa_lightning.sensitivity.exact import exact_passes
from kappa_lightning.sensitivity.fisher import sensitivities
from kappa_lightning.sensitivity.gradients import differentiating
from kappa_lightning.sensitivity.interactions import Matrix, interactions
from kappa_lightning.sensitivity.path import signals_along
from kappa_lightning.sensitivity.row import SensitivityRow
from kappa_lightning.sensitivity.settings import SensitivitySettings
from kappa_lightning.sensitivity.signal import signals
from kappa_lightning.sensitivity.trial import KEPT, Trial, margins
from kappa_lightning.weights import Weight

Loss = Callable[[Any, Any], Tensor]
Tick = Callable[[int], None]
Watch = Callable[[str, int], AbstractContextManager[Tick]]
"""A progress bar: from a description and a number of steps to a context that yields what counts them."""
Result = tuple[list[SensitivityRow], SensitivitySettings]
PathResult = tuple[list[SensitivityRow], SensitivitySettings, Matrix]


@contextmanager
def _silent(description: str, total: int) -> Iterator[Tick]:
    yield lambda steps: None


@dataclass
class Measurement:
    """What is measured, and in which circumstances.

    The module is afterwards as it was, bit for bit: weights, gradients, buffers, modes, what else its submodules keep,
    and all random numbers.

    Attributes:
        module: the pretrained model, in the modes in which it will train.
        weights: the candidates; each requires a gradient.
        batches: of the new task. Several processes are given the same ones and share them.
        loss: ``loss(module, batch)``, a scalar.
        reference: see :meth:`~kappa_lightning.sensitivity.SensitivityProfile.from_model`.
        seed: of what is drawn.
        place: brings a batch of the task to the module; by default, to where its first parameter is.
        place_reference: the same for a batch of the reference; one that is placed already stays as it is.
        precision: the context of a forward pass, such as autocast.
        settle: called when forward passes are over.
        processes: who shares the batches, each with the whole module; only this one by default, which is right for
            processes that must run every forward pass together, too (FSDP2).
        watch: a progress bar.
        alongside: parameters that will train whatever is chosen, and train along where candidates train for some
            steps (:meth:`by_path`, :meth:`by_trial`); each requires a gradient and is none of a candidate's.
        loss_scale: what the loss is multiplied with before its backward pass, so that gradients in float16 do not
            vanish; the figures are those without.
    """

    module: nn.Module
    weights: Sequence[Weight]
    batches: Sequence[Any]
    loss: Loss
    reference: Any = "auto"
    seed: int = 0
    place: Callable[[Any], Any] | None = None
    place_reference: Callable[[Any], Any] | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    settle: Callable[[], None] = lambda: None
    processes: Processes = field(default_factory=Processes)
    watch: Watch = _silent
    alongside: Sequence[nn.Parameter] = ()
    loss_scale: float = 1.0

    def by_gradients(self, optimizer: str = "adam", draws: int = 1) -> Result:
        """Signal and sensitivity from gradients at the start.

        Beyond the model and what a step of training needs for one batch, it takes the memory of one gradient of the
        candidates.

        Args:
            optimizer: ``"adam"`` or ``"sgd"``.
            draws: of labels for each batch of the reference.

        Raises:
            TypeError: if what the model says cannot be told.
            ValueError: if there is no batch, or a loss is no finite scalar.
        """
        asked = resolve_reference(self.reference, self.module)
        asked.require(self.batches)
        with differentiating(self.module, self.weights):
            with self.watch("Signal", self._share(len(self.batches))) as tick:
                losses = (self._step(number, tick) for number in self._numbers(len(self.batches)))
                signal = signals(self.weights, losses, optimizer, processes=self.processes, scale=self.loss_scale)
            with modes_restored(self.module):
                self.module.eval()
                prepared = self._prepare(asked)
                total = self._share(len(prepared)) * draws if isinstance(prepared, Sized) else 0
                with self.watch("Sensitivity", total) as tick:
                    outputs = self._outputs(asked, prepared, tick)
                    sensitivity, rows = sensitivities(
                        self.weights, outputs, draws=draws, seed=self.seed, processes=self.processes
                    )
            self.settle()
        settings = SensitivitySettings(optimizer, "gradient", str(asked), len(self.batches), rows, self.seed)
        return self._rows(signal, sensitivity), settings

    def by_path(self, optimizers: Sequence[Optimizer]) -> PathResult:
        """Signal along the first steps of training, one for each batch, and sensitivity along what they have moved.

        It takes a forward pass over the reference for each candidate, two copies of the candidates, and what the
        optimizers keep of them. The third of what it returns is the sensitivities of all pairs
        (:func:`~kappa_lightning.sensitivity.interactions.interactions`), the diagonal of which the rows have.

        Args:
            optimizers: those that will train; they are as they were afterwards.

        Raises:
            TypeError: if what the model says cannot be told, or not as a point.
            ValueError: if there is no batch, a loss is no finite scalar, or the optimizers' rates are too high.
        """
        self._require_batches_and_digits("path")
        asked = resolve_reference(self.reference, self.module, few=True)
        asked.require(self.batches)
        with differentiating(self.module, self.weights, self.alongside):
            # Every process takes all steps, each of which needs the one before.
            with self.watch("Signal", len(self.batches)) as tick:
                signal, moved = signals_along(
                    self.weights,
                    lambda number: self._step(number, tick)(),
                    optimizers,
                    steps=len(self.batches),
                    alongside=self.alongside,
                    scale=self.loss_scale,
                    settle=self.settle,
                )
            with modes_restored(self.module):
                self.module.eval()
                prepared = list(self._prepare(asked))
                self.settle()
                passes = self._share(len(prepared)) * (1 + len(self.weights))
                with self.watch("Sensitivity", passes) as tick, torch.no_grad():
                    outputs = self._outputs(asked, prepared, tick, exact=True)
                    matrix, rows = interactions(
                        self.weights, moved, outputs, processes=self.processes, settle=self.settle
                    )
            self.settle()
        settings = SensitivitySettings("adam", "path", str(asked), len(self.batches), rows, self.seed)
        along = {weight.name: max(0.0, float(matrix[i, i])) for i, weight in enumerate(self.weights)}
        return self._rows(signal, along), settings, matrix

    def by_trial(self, optimizers: Sequence[Optimizer], steps: int = 32) -> Result:
        """Signal and sensitivity from a short training run, whose movement is taken back tensor by tensor.

        It takes a copy of the candidates and what the optimizers keep of them; with a softmax, also the
        :data:`~kappa_lightning.sensitivity.trial.KEPT` likeliest probabilities of each row of the reference.

        Args:
            optimizers: those that will train; they are as they were afterwards.
            steps: how many, with the batches from the beginning again when they are through.

        Raises:
            TypeError: if what the model says cannot be told.
            ValueError: if there is no batch, a loss is no finite scalar, or the optimizers' rates are too high.
        """
        self._require_batches_and_digits("trial")
        asked = resolve_reference(self.reference, self.module, few=True)
        asked.require(self.batches)
        with differentiating(self.module, self.weights, self.alongside):
            with modes_restored(self.module):
                self.module.eval()
                prepared = list(self._prepare(asked))
            trial = Trial(
                step=lambda number: self._step(number, None)(),
                losses=self._mean_loss,
                describe=lambda: [said.describe(KEPT) for said in self._said(asked, prepared)],
                divergence=lambda before: self._divergence(asked, prepared, before),
                settle=self.settle,
            )
            with self.watch("Trial", steps + self._share(len(self.weights))) as tick:
                signal, sensitivity = margins(
                    self.module,
                    self.weights,
                    trial,
                    optimizers,
                    steps=steps,
                    alongside=self.alongside,
                    processes=self.processes,
                    tick=tick,
                )
            rows = sum(len(said) for said in self._said(asked, prepared))
            self.settle()
        settings = SensitivitySettings("adam", "trial", str(asked), len(self.batches), rows, self.seed)
        return self._rows(signal, sensitivity), settings

    def _require_batches_and_digits(self, method: str) -> None:
        if not self.batches:
            raise ValueError("the train dataloader gave no batch: there is no task to measure a signal of")
        rounded = [weight for weight in self.weights if weight.dtype in (torch.float16, torch.bfloat16)]
        if rounded and self.processes.is_global_zero:
            warnings.warn(
                f"{rounded[0].name} is stored as {str(rounded[0].dtype).removeprefix('torch.')}, in which a few steps "
                f'of training are mostly rounding: with method="{method}" keep the weights in float32 (precision '
                'bf16-mixed in place of bf16-true), or use method="gradient"',
                stacklevel=3,
            )

    def _share(self, total: int) -> int:
        return math.ceil(total / self.processes.world_size)

    def _numbers(self, total: int) -> range:
        return range(self.processes.rank, total, self.processes.world_size)

    def _step(self, number: int, tick: Tick | None, exact: bool = False) -> Callable[[], Tensor]:
        def step() -> Tensor:
            # Dropout draws the same whichever process has the batch.
            torch.manual_seed(self.seed * 1_000_003 + number)
            with self._pass(exact):
                loss = self.loss(self.module, self._placed(self.batches[number % len(self.batches)], self.place))
            if tick is not None:
                tick(1)
            return loss

        return step

    @contextmanager
    def _pass(self, exact: bool) -> Iterator[None]:
        """A forward pass in the user's precision, or in full where it is taken for its difference from another."""
        device = next(self.module.parameters()).device
        with self.precision(), exact_passes(device) if exact else nullcontext():
            yield

    def _prepare(self, asked: ReferenceInputs) -> Any:
        steps = steps_of(asked, len(self.batches))
        description = "Generating text" if isinstance(asked, GeneratedText) else "Synthesizing inputs"
        with (self.watch if steps else _silent)(description, steps) as tick:
            task = (self._placed(batch, self.place) for batch in self.batches)
            return asked.prepare(self.module, task, watch=tick)

    def _outputs(
        self, asked: ReferenceInputs, prepared: Any, tick: Tick, exact: bool = False
    ) -> Iterator[tuple[int, Callable[[], Any]]]:
        numbered = enumerate(prepared)
        for number, batch in islice(numbered, self.processes.rank, None, self.processes.world_size):

            def output(batch: Any = batch) -> Any:
                tick(1)
                with self._pass(exact):
                    return asked.distribution(self.module, self._placed(batch, self.place_reference))

            yield number, output

    def _said(self, asked: ReferenceInputs, prepared: Sequence[Any]) -> Iterator[Any]:
        with torch.no_grad():
            for batch in prepared:
                with self._pass(exact=True):
                    said = asked.distribution(self.module, self._placed(batch, self.place_reference))
                yield said

    def _divergence(self, asked: ReferenceInputs, prepared: Sequence[Any], before: Sequence[Any]) -> float:
        total, rows = 0.0, 0
        for said, kept in zip(self._said(asked, prepared), before, strict=True):
            total += float(said.divergence(kept).double().sum())
            rows += len(said)
        return total / rows

    def _mean_loss(self) -> float:
        with torch.no_grad():
            losses = [float(self._step(number, None, exact=True)()) for number in range(len(self.batches))]
        return math.fsum(losses) / len(losses)

    def _placed(self, batch: Any, place: Callable[[Any], Any] | None) -> Any:
        if place is not None:
            return place(batch)
        device = next(self.module.parameters()).device
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)

    def _rows(self, signal: dict[str, float], sensitivity: dict[str, float]) -> list[SensitivityRow]:
        return [_row(weight, signal[weight.name], sensitivity[weight.name]) for weight in self.weights]


def steps_of(reference: ReferenceInputs, batches: int) -> int:
    """How many steps a progress bar of making the reference counts."""
    if isinstance(reference, SynthesizedInputs):
        return reference.steps * batches
    if not isinstance(reference, GeneratedText):
        return 0
    return math.ceil(reference.num_sequences / max(reference.batch_size, 16)) * (reference.num_tokens - 1)


def _row(weight: Weight, signal: float, sensitivity: float) -> SensitivityRow:
    count = math.prod(weight.shape)
    if weight.part is None and weight.is_made:
        count = sum(parameter.numel() for parameter in weight.parameters)
    dtype = str(weight.dtype).removeprefix("torch.")
    content = weight.fingerprint()
    return SensitivityRow(weight.name, weight.shape, signal, sensitivity, count, dtype, content)
