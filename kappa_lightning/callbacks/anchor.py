"""Hold a model's outputs where they were before fine-tuning, beside whatever task it learns."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from kappa_lightning.anchoring.objective import Kind
from kappa_lightning.anchoring.outputs import without_noise
from kappa_lightning.anchoring.pull import pull_back
from kappa_lightning.anchoring.strength import Strength, check_strength
from kappa_lightning.arguments import as_count
from kappa_lightning.callbacks.anchor_references import AnchorReferences, Source, TaskPart
from kappa_lightning.callbacks.extra_gradient import add_gradient, will_step
from kappa_lightning.callbacks.keyed import Keyed
from kappa_lightning.callbacks.pretrained import PretrainedKeeper
from kappa_lightning.callbacks.reporting import log_scalars, log_text
from kappa_lightning.callbacks.stopwatch import Stopwatch
from kappa_lightning.callbacks.unseen_steps import UnseenSteps
from kappa_lightning.probes.inputs import Output, ReferenceInputs
from kappa_lightning.restoring import random_numbers_restored
from kappa_lightning.strategies import adapter_for
from kappa_lightning.weights import plain_parameters


class PretrainedAnchor(Keyed):
    """Add the gradient of a divergence from the pretrained model to every optimizer step.

    The module's own ``training_step`` stays as it is. Before a step, when the task's gradient is accumulated, reduced
    and unscaled, the gradient of ``strength`` × D is added to it, where D is the mean divergence in nats on a batch of
    references; the Trainer's gradient clipping then acts on the sum of both. The pass runs in eval mode and leaves
    random number generators, modes and statistics as they were; the task's dataloader is not touched.

    Where D comes from:

    - *references*, fixed when training starts: text that the model generates itself (``"generated"``, no data needed;
      an image-text model writes it without a picture, from random tokens if it has no begin token of its own),
      the task's first batches (``"inputs"``), a dataloader of yours, or a file that :meth:`save_references` wrote;
    - ``"batch"``: the task's own batch of the step (with accumulation, the last one of it).

    What it is compared with is either recorded when training starts, or comes from a forward pass with what trains put
    back to what it was (``source``). With ``"auto"`` references are recorded if they fit into ``max_bytes``, which
    spares the pass; the task's own batches always need it. Which one runs, and what it takes, is logged at the
    beginning, and the time for each step at the end.

    Logged at every ``log_every_n_steps`` of the Trainer, at its global step, as of before that step:

    - ``anchor/divergence``: D, in nats a token (or sample);
    - ``anchor/strength``: the factor in front of it;
    - ``anchor/new_task_divergence``: KL(p ‖ q) on the new task's own batch, which predicts what is forgotten better
      than the distance of the weights does (arXiv 2509.04259).

    Works with one process, DDP and ModelParallelStrategy (FSDP2): each process works on its share of the samples of a
    batch. With several optimizers each gets its own part of the gradient, at the cost of a pass each. With manual
    optimization it works for the optimizers that ``self.optimizers()`` returns, which call Lightning's hooks; it warns
    of one that steps without them. A communication hook of DDP does not see this gradient.

    A checkpoint holds what trains as it was, and the references, so that a resumed run equals the uninterrupted one.

    Args:
        reference: ``"generated"``, ``"inputs"``, ``"batch"``, a dataloader or list of batches, the path of saved
            references, or a :class:`~kappa_lightning.probes.ReferenceInputs`, of which
            :class:`~kappa_lightning.probes.TaskInputs` is ``"batch"``; ``"auto"`` is generated text if the module
            holds a transformers model that can generate, and otherwise the task's batch.
        strength: the factor of the divergence; with 0 nothing is added, and the run is bit-identical to one without
            this callback, which then only measures.
        max_divergence: a budget in nats: the strength is raised while D is above it and lowered while it is below, in
            proportion (:class:`~kappa_lightning.anchoring.strength.Strength`).
        divergence: ``"kl"`` is KL(p ‖ q) of the present distributions q from the pretrained ones p; ``"cross_entropy"``
            that of the references' own tokens, less what it was before training.
        exclude_target: whether the token (or class) that the batch says is right is left out of p and q, so that it
            may become as likely as the task wants.
        weight_pull: a pull of the weights towards where they were, decoupled from the gradient as AdamW's decay is:
            θ ← θ − lr·weight_pull·(θ − θ₀) at each step.
        every_n_steps: the optimizer steps from one addition to the next.
        batches: how many batches of references are kept.
        batch_size: sequences in a batch of generated text, over all processes.
        num_tokens: the length of a generated sequence.
        output: ``output(module, batch)`` returns logits of shape (…, classes) or a distribution of
            ``kappa_lightning.probes.output``; by default what :class:`~kappa_lightning.probes.inputs.ReferenceInputs`
            finds out.
        task_inputs: what of a task's batch the model takes: a function of the batch, or the key of an entry of it.
        source: ``"recorded"``, ``"forward"`` or ``"auto"``.
        top_k: how many of a recorded distribution's likeliest classes are kept; all if ``None``.
        max_bytes: what the recorded distributions of one process may take.
        directory: a folder for what trains as it was and for the recorded distributions; in memory, and the former in
            every checkpoint, if ``None``.
        new_task_divergence: whether that figure is measured.
        adaptation_rate: how fast ``max_divergence`` moves the strength.
        seed: of generated text.

    Attributes:
        strength: the factor as it is now.
        references: the batches of references, on the CPU, once training has started.
        source: ``"recorded"`` or ``"forward"``, once training has started.

    Raises:
        ValueError: if an argument is out of range; when training starts, if the module has nothing to generate text
            with, its output is of no known kind, references do not fit into ``max_bytes``, or the weights have trained
            already and no checkpoint says what they were.
        TypeError: when training starts, if a parameter that trains is quantized.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> old_inputs = [torch.randn(4, 32), torch.randn(4, 32)]
        >>> anchor = PretrainedAnchor([(x,) for x in old_inputs], strength=1.0, new_task_divergence=False)
        >>> trainer = Trainer(
        ...     callbacks=[anchor], max_steps=3, logger=False, accelerator="cpu", enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        ... )
        >>> trainer.fit(BoringModel())
        >>> anchor.source, sorted(tag for tag in trainer.logged_metrics if tag.startswith("anchor/"))
        ('recorded', ['anchor/divergence', 'anchor/strength'])
    """

    def __init__(
        self,
        reference: Literal["auto", "generated", "inputs", "batch"]
        | str
        | os.PathLike[str]
        | Iterable[Any]
        | ReferenceInputs = "auto",
        strength: float = 1.0,
        *,
        max_divergence: float | None = None,
        divergence: Kind = "kl",
        exclude_target: bool = False,
        weight_pull: float = 0.0,
        every_n_steps: int = 1,
        batches: int = 12,
        batch_size: int = 4,
        num_tokens: int = 96,
        output: Output | None = None,
        task_inputs: TaskPart | None = None,
        source: Source = "auto",
        top_k: int | None = None,
        max_bytes: int = 2**30,
        directory: str | os.PathLike[str] | None = None,
        new_task_divergence: bool = True,
        adaptation_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_strength(strength, max_divergence, adaptation_rate)
        if not isinstance(weight_pull, int | float) or not 0 <= weight_pull < float("inf"):
            raise ValueError(f"weight_pull={weight_pull!r} must be a number of at least 0")
        self.every_n_steps = as_count(every_n_steps, "every_n_steps")
        self.weight_pull = weight_pull
        self.new_task_divergence = new_task_divergence
        self._strength = Strength(strength, max_divergence, rate=adaptation_rate)
        self._references = AnchorReferences(
            reference,
            kind=divergence,
            exclude_target=exclude_target,
            batches=batches,
            batch_size=batch_size,
            num_tokens=num_tokens,
            output=output,
            task_inputs=task_inputs,
            source=source,
            top_k=top_k,
            max_bytes=max_bytes,
            directory=None if directory is None else Path(directory) / "references",
            seed=seed,
        )
        self._keeper = PretrainedKeeper("PretrainedAnchor", directory)
        self._steps: list[int] = []
        self._batch: Any = None
        self._watch = Stopwatch()
        self._unseen = UnseenSteps("PretrainedAnchor")

    @property
    def strength(self) -> float:
        """The factor as it is now."""
        return self._strength.value

    @property
    def references(self) -> list[Any]:
        """The batches of references, on the CPU; none before training has started, or with ``"batch"``."""
        return self._references.batches

    @property
    def source(self) -> str:
        """Where the pretrained distributions come from."""
        return self._references.source

    def save_references(self, path: str | os.PathLike[str]) -> None:
        """Write the references to a ``.safetensors`` file, which ``reference=path`` reads.

        Raises:
            TypeError: if they are no mappings of names to tensors.
            ValueError: if there are none yet.
        """
        self._references.save(path)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            remedy = "give one of them all references"
            self.refuse_equals(trainer, "whose divergences would have the same tags", remedy)
            adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything
            self._keeper.runs.announced()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._keeper.runs.opened(checkpoint)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "LBFGS searches along a line by the loss that training_step returns, which the anchor is no part "
                    "of: use another optimizer, or leave PretrainedAnchor out"
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # By now a checkpoint is restored under every strategy, and whoever freezes has frozen.
        self._steps = [0] * len(trainer.optimizers)
        self._watch = Stopwatch()
        references = self._references
        device = None if references.needs_pass(pl_module) or self.weight_pull else "cpu"
        restored = self._keeper.take(trainer, pl_module, device)
        if restored is not None:
            self._strength.load_state_dict(restored["strength"])
            self._steps = list(restored["steps"])
        with random_numbers_restored():
            references.prepare(trainer, pl_module, self._keeper, None if restored is None else restored["references"])
        assert self._keeper.state is not None
        self._keeper.state.move_to(None if references.source == "forward" or self.weight_pull else "cpu", pl_module)
        if not trainer.barebones:
            rank_zero_info(f"PretrainedAnchor: {references.describe()}; {self._keeper.describe()}")
        by_hand = not pl_module.automatic_optimization
        self._unseen = UnseenSteps("PretrainedAnchor", trainer.optimizers if by_hand else ())
        if trainer.global_step == 0 and (text := references.markdown(pl_module)):
            log_text(trainer, "anchor/references", text)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._keeper.state is not None
        number = next(n for n, other in enumerate(trainer.optimizers) if _same(other, optimizer))
        step = self._steps[number]
        self._steps[number] += 1
        self._unseen.saw(number)
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # training_step returned None, and nothing steps
        # A parameter that was unfrozen just now has not moved yet.
        self._keeper.state.add(pl_module)
        logs = number == 0 and trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        due = step % self.every_n_steps == 0
        scalars: dict[str, float] = {}
        if due and not self._strength.is_zero:
            with self._watch.measuring(trainer, logs or step == 0):
                divergence = self._add(trainer, pl_module, optimizer, step // self.every_n_steps)
            if logs:
                scalars |= {"anchor/divergence": divergence.item(), "anchor/strength": self.strength}
            self._strength.update(divergence)
        elif logs and due:
            divergence = self._measured(trainer, pl_module, step // self.every_n_steps)
            scalars |= {"anchor/divergence": divergence.item(), "anchor/strength": self.strength}
        if logs and self.new_task_divergence:
            scalars["anchor/new_task_divergence"] = self._measured_on_task(trainer, pl_module).item()
        if scalars:
            log_scalars(trainer, scalars)
        if self.weight_pull and will_step(trainer, optimizer):
            pull_back(optimizer, plain_parameters(pl_module), self._keeper.state, self.weight_pull)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._batch = None
        self._unseen.check()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.barebones and (took := self._watch.describe()):
            rank_zero_info(f"PretrainedAnchor: {took}, {self._references.source} distributions")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keeper.runs.fit_ended()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._batch = None
        self._keeper.runs.ended()

    @override
    def state_dict(self) -> dict[str, Any]:
        pretrained = self._keeper.state_dict()
        if pretrained is None or not self._steps:
            return self._keeper.runs.to_save()
        return {
            "pretrained": pretrained,
            "references": self._references.state_dict(),
            "strength": self._strength.state_dict(),
            "steps": list(self._steps),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this for validate, test and predict, too; only a fit takes it over.
        self._keeper.runs.loaded(state_dict)

    def __repr__(self) -> str:
        shown = {
            "reference": self._references.reference,
            "strength": self.strength,
            "max_divergence": self._strength.budget,
            "every_n_steps": self.every_n_steps,
        }
        arguments = (f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"PretrainedAnchor({', '.join(arguments)})"

    def __getstate__(self) -> dict[str, Any]:
        idle = {"_batch": None, "_watch": Stopwatch(), "_unseen": UnseenSteps("PretrainedAnchor")}
        return self.__dict__ | idle

    def _add(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, turn: int) -> Tensor:
        """Add the gradient of one turn, and return the mean divergence over all processes."""
        found: list[Tensor] = []
        state = self._keeper.state
        assert state is not None

        def loss() -> Tensor:
            # The backward pass is no part of autocast, which has done its work in the forward.
            with trainer.precision_plugin.forward_context():
                total, count = self._references.divergence(module, state, turn, self._batch)
            mean, rows, processes = _over_processes(trainer, total, count)
            found.append(mean)
            # Gradients are averaged over the processes, and what counts is the mean over all rows of all of them.
            return total * (self._strength.factor(total.device) * processes / rows.to(total.dtype))

        with torch.enable_grad(), self._passing(trainer, module):
            add_gradient(trainer, module, optimizer, loss)
        return found[0]

    def _measured(self, trainer: pl.Trainer, module: pl.LightningModule, turn: int) -> Tensor:
        assert self._keeper.state is not None
        with torch.no_grad(), self._passing(trainer, module), trainer.precision_plugin.forward_context():
            total, count = self._references.divergence(module, self._keeper.state, turn, self._batch)
        return _over_processes(trainer, total, count)[0]

    def _measured_on_task(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        assert self._keeper.state is not None
        with torch.no_grad(), self._passing(trainer, module), trainer.precision_plugin.forward_context():
            total, count = self._references.on_task(module, self._keeper.state, self._batch)
        return _over_processes(trainer, total, count)[0]

    @staticmethod
    def _passing(trainer: pl.Trainer, module: pl.LightningModule) -> ExitStack:
        """What holds around a forward and a backward pass: modes, random numbers, and where parameters lie."""
        stack = ExitStack()
        adapter = adapter_for(trainer)
        adapter.settle(module)
        stack.callback(adapter.settle, module)
        stack.enter_context(random_numbers_restored())
        stack.enter_context(without_noise(module))
        return stack


def _over_processes(trainer: pl.Trainer, total: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """The mean over the rows of all processes, how many rows there are, and how many processes share them."""
    share = adapter_for(trainer).share(trainer)
    kind = torch.float32 if total.device.type == "mps" else torch.float64
    # No question to the device, which would wait for it at every step.
    sums = torch.stack([total.detach().to(kind), torch.full_like(total.detach(), float(count), dtype=kind)])
    if share.count > 1:
        torch.distributed.all_reduce(sums, group=share.group)
    return sums[0] / sums[1], sums[1], share.count


def _same(one: Any, other: Any) -> bool:
    return getattr(one, "_optimizer", one) is getattr(other, "_optimizer", other)
