"""What an anchor compares a module on, and what it compares it with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from kappa_lightning.anchoring.batches import keep, load_batches, num_samples, save_batches, share_of
from kappa_lightning.anchoring.objective import Kind, Objective, bytes_of, estimated_bytes
from kappa_lightning.anchoring.outputs import without_noise
from kappa_lightning.anchoring.pretrained import PretrainedState, call_pretrained
from kappa_lightning.arguments import as_count
from kappa_lightning.callbacks.pretrained import PretrainedKeeper
from kappa_lightning.callbacks.progress import track
from kappa_lightning.probes.generated import language_model
from kappa_lightning.probes.inputs import (
    GeneratedText,
    Output,
    ReferenceInputs,
    TaskInputs,
    writes,
)
from kappa_lightning.probes.references import References
from kappa_lightning.probes.resolving import resolve_reference
from kappa_lightning.processes import Processes
from kappa_lightning.strategies import Share, adapter_for

Source = Literal["auto", "recorded", "forward"]
TaskPart = str | Callable[[Any], Any]

_KINDS = ("auto", "generated", "inputs", "batch")
_SHOWN = 24


class AnchorReferences:
    """The batches of an anchor, its recorded distributions, and the divergence on them.

    See :class:`~kappa_lightning.PretrainedAnchor` for the arguments.

    Attributes:
        reference: ``"generated"``, ``"inputs"``, ``"batch"`` or ``"given"``.
        batches: those that are kept; of ``"inputs"`` this process' own, of others those of all processes.
        source: ``"recorded"`` or ``"forward"``, once prepared.
    """

    def __init__(
        self,
        reference: str | os.PathLike[str] | Iterable[Any] | ReferenceInputs,
        *,
        kind: Kind,
        exclude_target: bool,
        batches: int,
        batch_size: int,
        num_tokens: int,
        output: Output | None,
        task_inputs: TaskPart | None,
        source: Source,
        top_k: int | None,
        max_bytes: int,
        directory: Path | None,
        seed: int,
    ) -> None:
        sizes = {"batches": batches, "batch_size": batch_size, "num_tokens": num_tokens, "max_bytes": max_bytes}
        for argument, value in (sizes if top_k is None else {**sizes, "top_k": top_k}).items():
            as_count(value, argument)
        if source not in get_args(Source):
            raise ValueError(f"source={source!r} is unknown: use one of {', '.join(map(repr, get_args(Source)))}")
        self._given: ReferenceInputs | None = None
        self._file: Path | None = None
        if isinstance(reference, str) and reference in _KINDS:
            self.reference = reference
        elif isinstance(reference, str | os.PathLike):
            self.reference, self._file = "given", Path(reference)
            if not self._file.is_file():
                raise ValueError(
                    f"reference={str(reference)!r} is neither a file nor one of {', '.join(map(repr, _KINDS))}"
                )
        elif isinstance(reference, TaskInputs):
            if reference.__class__ is not TaskInputs:
                raise ValueError(
                    f"{type(reference).__name__} makes its inputs of the task's, which are not read before training "
                    "starts: make them beforehand, and give list(inputs.prepare(module, batches)) as the reference"
                )
            self.reference, output = "batch", reference.output or output
        elif isinstance(reference, ReferenceInputs):
            self.reference, self._given = "given", reference
        elif isinstance(reference, Iterable) and not isinstance(reference, Iterator):
            self.reference, self._given = "given", ReferenceInputs(reference, output)
        else:
            raise ValueError(
                f"reference is a {type(reference).__name__}: give one of {', '.join(map(repr, _KINDS))}, a dataloader, "
                "a list of batches, a ReferenceInputs or the path of saved references"
            )
        if self.reference == "batch" and source == "recorded":
            raise ValueError('source="recorded" cannot know the batches to come: use reference="inputs"')
        inputs = self._given or TaskInputs(output)
        self._objective = Objective(
            kind, exclude_target=exclude_target, inputs=inputs, top_k=top_k, references=References(max_bytes, directory)
        )
        self._task_objective = Objective("kl", inputs=TaskInputs(output), references=References(1, None))
        self._task_inputs = task_inputs
        self._wanted = source
        self._limit, self._batch_size, self._num_tokens, self._seed = batches, batch_size, num_tokens, seed
        self.batches: list[Any] = []
        self.source = "forward" if self.reference == "batch" else "" if source == "auto" else source
        self._own: list[Any] = []
        self._share, self._rank = Share(), 0
        self._place: Callable[[Any], Any] = lambda batch: batch

    def needs_pass(self, module: nn.Module) -> bool:
        """Whether passes of the pretrained model may be wanted at every step."""
        return self._resolved(module) == "batch" or self._wanted != "recorded"

    def prepare(
        self, trainer: pl.Trainer, module: pl.LightningModule, keeper: PretrainedKeeper, saved: dict[str, Any] | None
    ) -> None:
        """Have the batches and, if they are to be recorded, their distributions."""
        adapter = adapter_for(trainer)
        processes = adapter.processes(trainer)
        self._share, self._rank = adapter.share(trainer), processes.rank
        convert, device = trainer.precision_plugin.convert_input, trainer.strategy.root_device
        self._place = lambda batch: move_data_to_device(convert(batch), device)
        if self._resolved(module) == "generated" and self._file is None:
            self._objective.inputs = self._generated(module)
        if saved is not None:
            self.reference, self.source = saved["reference"], saved["source"]
            self.batches = self._restored(saved["batches"], processes.rank)
        elif not self.batches:
            self.reference = self._resolved(module)
            # In lockstep a process that fails leaves the others in a forward pass, where they cannot be told.
            together = Processes() if self._share.lockstep else processes
            with together.failing_together():
                made = self._made(trainer, module)
            # Text that each generated on its own device may differ in a token.
            self.batches = processes.broadcast(made)
        self._own = self.batches if self.reference == "inputs" else []
        adapter.settle(module)
        with without_noise(module), trainer.precision_plugin.forward_context():
            self._record(trainer, module, keeper)
        adapter.settle(module)

    def divergence(self, module: nn.Module, state: PretrainedState, turn: int, batch: Any) -> tuple[Tensor, int]:
        """The divergence of this process' share of a turn: its sum over the rows in nats, and their number.

        Args:
            module: as it is now.
            state: what trains, as it was.
            turn: the number of this addition, which decides whose turn it is among the references.
            batch: the task's own.
        """
        if self.reference == "batch":
            return self._objective.forward(module, self._task_part(batch), state)
        if self.reference == "inputs" and len(self._own) < self._limit:
            self._collect(module, state, batch)
        number = turn % len(self.batches)
        mine, counts = self._mine(self.batches[number])
        if self.source == "recorded":
            total, count = self._objective.recorded(module, self._place(mine), self._key(number))
        else:
            total, count = self._objective.forward(module, self._place(mine), state)
        return (total, count) if counts else (total * 0, 0)

    def on_task(self, module: nn.Module, state: PretrainedState, batch: Any) -> tuple[Tensor, int]:
        """KL(p ‖ q) on the task's own batch; see :meth:`divergence`."""
        try:
            return self._task_objective.forward(module, self._task_part(batch), state)
        except Exception as error:
            # Nothing is caught for good: the note says what to do about it.
            error.add_note(
                "on the task's own batch, for anchor/new_task_divergence: say with task_inputs=… what of it the model "
                "takes, give output=…, or new_task_divergence=False"
            )
            raise

    def describe(self) -> str:
        """What is compared with what, in words."""
        if self.reference == "batch":
            return "the task's own batches, compared with a forward pass of the pretrained model at each addition"
        kept = f"{len(self.batches)} batches of references ({self.reference})"
        if self.reference == "inputs":
            kept = f"the task's first {self._limit} batches"
        if self.source == "forward":
            return f"{kept}, compared with a forward pass of the pretrained model at each addition"
        size = self._objective.references.num_bytes / 1e6
        return f"{kept}, compared with distributions recorded in {size:,.1f} MB, without a pass of the pretrained model"

    def markdown(self, module: nn.Module) -> str:
        """The references as text, if they are any."""
        rows = []
        for batch in self.batches:
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                return ""
            mask = batch.get("attention_mask")
            for place, sequence in enumerate(ids):
                counted = sequence if not isinstance(mask, Tensor) else sequence[mask[place].bool()]
                rows.append(_text(module, counted.tolist()))
        table = "\n".join(f"| {number} | {row} |" for number, row in enumerate(rows[:_SHOWN], start=1))
        more = f"\n\n{len(rows) - _SHOWN} more are not shown." if len(rows) > _SHOWN else ""
        return f"| | text ({self.reference}) |\n|---:|---|\n{table}{more}" if rows else ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the batches to a file."""
        if not self.batches:
            raise ValueError("there are no references yet: they are made when training starts")
        save_batches(path, self.batches)

    def state_dict(self) -> dict[str, Any]:
        """The batches; the distributions are recorded anew from the pretrained weights, to the same bits."""
        batches = Processes.of_this_run().gather(self.batches) if self.reference == "inputs" else [self.batches]
        return {"reference": self.reference, "source": self.source, "batches": batches}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_place": None}

    def _resolved(self, module: nn.Module) -> str:
        if self.reference != "auto":
            return self.reference
        return "generated" if writes(language_model(module)) else "batch"

    def _restored(self, batches: list[list[Any]], rank: int) -> list[Any]:
        if self.reference != "inputs":
            return batches[0]
        if rank >= len(batches):
            raise ValueError(
                f"the run that is resumed kept the task's first batches of {len(batches)} processes, and this one has "
                f"rank {rank}: resume with as many"
            )
        return batches[rank]

    def _made(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
        if self.reference in ("batch", "inputs"):
            return []
        if self._file is not None:
            loaded = list(load_batches(self._file))
            _require_known_tokens(module, loaded, self._file)
            return loaded
        inputs = self._objective.inputs
        total = self._limit * (self._num_tokens - 1)
        ticks = track(trainer, range(total), total=total, description="References", unit="step")
        try:
            with trainer.precision_plugin.forward_context():
                made = inputs.prepare(module, (), watch=lambda steps: [next(ticks, None) for _ in range(steps)])
        finally:
            ticks.close()
        return keep(made, self._limit)

    def _generated(self, module: nn.Module) -> ReferenceInputs:
        found = resolve_reference("generated", module)  # which raises if the module cannot write
        assert isinstance(found, GeneratedText)
        return GeneratedText(self._limit * self._batch_size, self._num_tokens, self._batch_size, seed=self._seed)

    def _record(self, trainer: pl.Trainer, module: pl.LightningModule, keeper: PretrainedKeeper) -> None:
        assert keeper.state is not None
        objective, state = self._objective, keeper.state
        objective.references.clear()
        if self.reference == "batch" or (self.reference == "inputs" and not self.batches):
            self.source = self.source or ("forward" if self.reference == "batch" else "recorded")
            return
        parts = [self._mine(batch)[0] for batch in self.batches]
        if self.source == "forward":
            return
        shown = track(trainer, parts, total=len(parts), description="References", unit="batch")
        for number, part in enumerate(shown):
            described = call_pretrained(module, state, objective.describe, self._place(part))
            if number == 0 and not self.source:
                expected = estimated_bytes(bytes_of(described), [num_samples(each) for each in parts])
                fits = max(adapter_for(trainer).processes(trainer).gather(expected)) <= objective.references.max_bytes
                self.source = "recorded" if fits else "forward"
                if not fits:
                    return
            objective.references.add(self._key(number), described)

    def _collect(self, module: nn.Module, state: PretrainedState, batch: Any) -> None:
        """Keep a batch of the task, and what the pretrained model says on it."""
        (kept,) = keep([self._task_part(batch)], None)
        self._own.append(kept)
        if self.source == "recorded":
            described = call_pretrained(module, state, self._objective.describe, self._place(kept))
            self._objective.references.add(self._key(len(self._own) - 1), described)

    def _key(self, number: int) -> str:
        return f"{self._rank}-{number}"

    def _mine(self, batch: Any) -> tuple[Any, bool]:
        return (batch, True) if self.reference == "inputs" else share_of(batch, self._share.index, self._share.count)

    def _task_part(self, batch: Any) -> Any:
        if self._task_inputs is None:
            return batch
        return batch[self._task_inputs] if isinstance(self._task_inputs, str) else self._task_inputs(batch)


def _require_known_tokens(module: nn.Module, batches: Iterable[Any], file: Path) -> None:
    """Say of another model's references what they are, which on a GPU the failing look-up would not."""
    model = language_model(module)
    known = None if model is None else getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is None:
        return
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids")
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise ValueError(
                f"{file} has the token {int(ids.max())} in input_ids of its batch {number}, and the model has {known} "
                "tokens: another model wrote these references"
            )


def _text(module: nn.Module, tokens: list[int]) -> str:
    """Token ids as text if the module has a tokenizer, in a cell of a Markdown table."""
    holders = (module, *(getattr(module, name, None) for name in ("encoder", "processor")))
    tokenizers = (getattr(holder, "tokenizer", None) for holder in holders)
    tokenizer = next((each for each in tokenizers if callable(getattr(each, "decode", None))), None)
    text = " ".join(map(str, tokens)) if tokenizer is None else str(tokenizer.decode(tokens))
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
