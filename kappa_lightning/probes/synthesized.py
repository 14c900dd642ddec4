"""Inputs that a classifier recognizes, which it makes of the new task's, as a language model writes its own text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kappa_lightning.probes.inputs import Output, TaskInputs
from kappa_lightning.probes.output import Categorical, OutputDistribution
from kappa_lightning.restoring import gradients_restored

_NO_INPUTS = ("labels", "label", "target", "targets", "attention_mask")
_INSTEAD = 'use reference="inputs" or a dataloader'


class SynthesizedInputs(TaskInputs):
    """The new task's inputs, changed until the pretrained model takes each for some class: model inversion.

    Of the new task's inputs a classifier often knows nothing: what it says of them is arbitrary, and how a weight
    changes that says little of what would be forgotten. Yet it holds what it knows, and its gradient writes it back
    into an input. For every input x of the task a class y is drawn, all of them alike, and x climbs ln p(y|x) by steps
    of Adam, each of ``rate`` standard deviations of the batch's entries, within the batch's range. Neither pretraining
    data nor labels are needed. The idea is that of Mahendran & Vedaldi (arXiv 1412.0035); in place of data it is used
    by Nayak et al. (arXiv 1905.08114) and Yin et al. (arXiv 1912.08795).

    The inputs are the floating-point tensor that the batch is, or that is its first entry; of a mapping its only one
    but for masks and labels. The model says one softmax a sample.

    Args:
        steps: how many.
        rate: length of a step in standard deviations.
        output: see :class:`~kappa_lightning.probes.ReferenceInputs`.
        seed: of the classes.
        required: whether it is an error if the inputs are no such tensor, or the output no such softmax; if not, the
            task's inputs are then taken as they are.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 3)
        >>> (made,) = SynthesizedInputs(steps=200).prepare(model, [(torch.rand(6, 4), torch.zeros(6).long())])
        >>> tuple(made[0].shape), bool((made[0] >= 0).all() and (made[0] <= 1).all())
        ((6, 4), True)
    """

    def __init__(
        self,
        steps: int = 32,
        rate: float = 0.3,
        output: Output | None = None,
        seed: int = 0,
        required: bool = True,
    ) -> None:
        super().__init__(output)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be an int of at least 1")
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate={rate!r} must be a positive number")
        self.steps = steps
        self.rate = rate
        self.seed = seed
        self.required = required
        self._as_they_are = False

    def __str__(self) -> str:
        return (
            super().__str__() if self._as_they_are else "the task's inputs, changed into ones that the model recognizes"
        )

    @override
    def require(self, task: Sequence[Any]) -> None:
        if not self.required or not task:
            return
        try:
            _input_of(task[0])
        except _CannotError as error:
            raise TypeError(f"{error}: {_INSTEAD}") from error

    def prepare(
        self, module: nn.Module, task: Iterable[Any] = (), *, watch: Callable[[int], Any] | None = None
    ) -> Iterable[Any]:
        """The task's batches with the changed inputs in place of theirs.

        Raises:
            TypeError: if ``required``, and the inputs cannot be changed or the output is no softmax a sample.
        """
        batches = list(task)
        self._as_they_are = False
        made = []
        for number, batch in enumerate(batches):
            try:
                made.append(self._changed(module, batch, number, watch))
            except _CannotError as error:
                if self.required:
                    raise TypeError(f"{error}: {_INSTEAD}") from error
                self._as_they_are = True
                return batches
        return made

    def _changed(self, module: nn.Module, batch: Any, number: int, watch: Callable[[int], Any] | None) -> Any:
        given, put = _input_of(batch)
        low, high = given.float().aminmax()
        x = given.detach().float().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=self.rate * float(given.float().std(correction=0)))
        generator = torch.Generator(given.device).manual_seed(self.seed * 1_000_003 + number)
        classes: Tensor | None = None
        # Backward through all of it, and not torch.autograd.grad: sharded and checkpointed modules know only that.
        with torch.inference_mode(False), torch.enable_grad(), gradients_restored(module.parameters()):
            for _ in range(self.steps):
                said = _require_softmax(self.distribution(module, put(x.to(given.dtype))), len(given))
                if classes is None:
                    count = said.logits.shape[-1]
                    classes = torch.randint(count, (len(given),), generator=generator, device=given.device)
                optimizer.zero_grad()
                if not said.logits.requires_grad:
                    raise _CannotError("what the model says has no gradient with respect to its inputs")
                (-said.log_prob(classes).sum()).backward()  # type: ignore[no-untyped-call]
                if x.grad is None:
                    raise _CannotError("what the model says does not depend on the inputs that are tensors")
                for parameter in module.parameters():
                    parameter.grad = None
                optimizer.step()
                with torch.no_grad():
                    x.clamp_(low, high)
                if watch is not None:
                    watch(1)
        return put(x.detach().to(given.dtype))


class _CannotError(Exception):
    """The inputs of a model of this kind cannot be changed by its gradient."""


def _require_softmax(said: OutputDistribution, samples: int) -> Categorical:
    if not isinstance(said, Categorical) or len(said) != samples:
        found = f"{type(said).__name__} with {len(said)} rows for {samples} samples"
        raise _CannotError(f"inputs are synthesized for a softmax a sample, and the model says {found}")
    return said


def _input_of(batch: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor of a batch that the model sees, and how to put another in its place."""
    if isinstance(batch, Tensor):
        return _floating(batch), lambda x: x
    if isinstance(batch, Mapping):
        names = [
            name
            for name, value in batch.items()
            if name not in _NO_INPUTS and isinstance(value, Tensor) and value.is_floating_point()
        ]
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise _CannotError(
                f"one entry of the batch must be a floating-point tensor to synthesize, and found: {found}"
            )
        return batch[names[0]], lambda x: {**batch, names[0]: x}
    if isinstance(batch, Sequence) and len(batch) and isinstance(batch[0], Tensor):
        return _floating(batch[0]), lambda x: [x, *batch[1:]]
    raise _CannotError(f"the batch is a {type(batch).__name__} without a tensor to synthesize")


def _floating(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim == 0:
        raise _CannotError(
            f"the inputs are {tensor.dtype} of shape {tuple(tensor.shape)}, which no gradient can change"
        )
    return tensor
