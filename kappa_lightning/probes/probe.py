"""A capability to keep: batches, a metric, and the step between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

Step = Callable[[Any, Any], Any]

FIGURES = ("retention", "retention_low", "retention_high", "forgetting", "above_chance", "nats", "recoverable")
"""What is logged beside a probe's metric, and so no name of a metric."""


class Probe:
    """A capability to keep: batches, a metric, and the step from a batch to what the metric takes.

    Args:
        dataloader: batches of any structure, the same each time it is iterated; a finite one.
        metric: a torchmetrics ``Metric`` with a scalar result; its ``higher_is_better`` decides the direction.
        step: ``step(module, batch)`` returns what ``metric.update`` takes: a tensor, a tuple of positional or a dict
            of keyword arguments. The module is in eval mode, without gradients, the batch on its device. Of several
            processes each runs it on a share of the batches.
        name: the metric's name in the logs; by default its class in snake case.
        chance: the metric of a model that has not the capability, such as one that guesses; ``None`` if not known.
        loss: ``loss(module, batch)`` returns a scalar tensor that falls as the capability grows, for
            ``ForgettingEval(recoverable=…)``, which takes steps down it on a copy.

    Raises:
        TypeError: if ``metric`` is no single torchmetrics ``Metric``, or ``step`` cannot be called.
        ValueError: if the metric does not tell its direction, or the dataloader is empty or can be read only once.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import BinaryAccuracy
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.ones(8))
        >>> probe = Probe(
        ...     torch.utils.data.DataLoader(data, batch_size=4),
        ...     BinaryAccuracy(),
        ...     lambda module, batch: (module(batch[0]).squeeze(-1), batch[1]),
        ... )
        >>> probe.name, probe.higher_is_better
        ('binary_accuracy', True)
        >>> probe
        Probe(binary_accuracy over 2 batches, higher is better)
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        metric: Metric,
        step: Step,
        *,
        name: str | None = None,
        chance: float | None = None,
        loss: Step | None = None,
    ) -> None:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"metric is a {type(metric).__name__}, not one torchmetrics Metric; give each metric a probe of its own"
            )
        if metric.higher_is_better is None:
            raise ValueError(
                f"{type(metric).__name__} does not say whether higher is better: set its higher_is_better to True or "
                "False, in a subclass"
            )
        if not callable(step):
            raise TypeError(f"step={step!r} is not callable: give a function of (module, batch)")
        if isinstance(dataloader, Iterator) or not isinstance(dataloader, Iterable):
            raise ValueError(
                f"the dataloader is a {type(dataloader).__name__}, which cannot be read again for every evaluation: "
                "give a DataLoader or a list of batches"
            )
        if known_length(dataloader) == 0:
            raise ValueError("the dataloader is empty: there is nothing to measure")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss={loss!r} is not callable: give a function of (module, batch)")
        self.dataloader = dataloader
        self.metric = metric
        self.step = step
        self._loss = loss
        self.name = name or _snake_case(type(metric).__name__)
        if chance is not None and (isinstance(chance, bool) or not isinstance(chance, int | float)):
            raise TypeError(f"chance={chance!r} is no number: give the metric of a model that guesses")
        self._chance = None if chance is None else float(chance)
        if self.name in FIGURES:
            raise ValueError(f"name={self.name!r} is the tag of another figure: choose another")

    def __repr__(self) -> str:
        count = known_length(self.dataloader)
        batches = "an unknown number of batches" if count is None else f"{count} batch{'' if count == 1 else 'es'}"
        direction = "higher" if self.higher_is_better else "lower"
        return f"{type(self).__name__}({self.name} over {batches}, {direction} is better)"

    @property
    def higher_is_better(self) -> bool:
        """The direction of the metric."""
        return bool(self.metric.higher_is_better)

    @property
    def chance(self) -> float | None:
        """The metric of a model that has not the capability; ``None`` if it is not known."""
        return self._chance

    @property
    def has_loss(self) -> bool:
        """Whether the capability can be trained, by :meth:`loss_of`."""
        return self._loss is not None or type(self).loss_of is not Probe.loss_of

    def loss_of(self, module: nn.Module, batch: Any) -> Tensor:
        """A scalar that falls as the capability grows, with a gradient to what trains.

        Raises:
            TypeError: if the probe has none.
        """
        if self._loss is None:
            raise TypeError(f"{type(self).__name__} has no loss: give it one, loss=…")
        loss: Tensor = self._loss(module, batch)
        return loss

    def begin_baseline(self) -> None:
        """Called before the pass over the batches that measures the baseline, on the pretrained weights."""

    def report(self) -> str | None:
        """A text in Markdown on the last evaluation, for loggers that take texts; none, unless a subclass has one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the baseline; nothing, unless a subclass says otherwise."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""

    def prepare(self, batch: Any, convert: Callable[[Any], Any]) -> Any:
        """The batch with its inputs in the precision of the module; ``convert`` casts the floats of a collection."""
        return convert(batch)

    def update(self, module: nn.Module, batch: Any) -> Any:
        """Run the step on a batch and give its result to the metric.

        Returns:
            What the step returned.

        Raises:
            TypeError: if the step returns something that ``metric.update`` cannot take.
        """
        result = self.step(module, batch)
        self.give(self.metric, result)
        return result

    def give(self, metric: Metric, result: Any) -> None:
        """Update a metric with what the step returned, or a part of it."""
        if isinstance(result, Tensor):
            metric.update(result)
        elif isinstance(result, Mapping):
            metric.update(**result)
        elif isinstance(result, tuple | list):
            metric.update(*result)
        else:
            raise TypeError(
                f"step returned a {type(result).__name__}; {type(self.metric).__name__}.update takes a tensor, a tuple "
                "of its positional arguments or a dict of its keyword arguments"
            )

    def split(self, result: Any, batch: Any) -> list[Any] | None:
        """What the step returned, sample by sample; ``None`` if it cannot be split.

        Here every tensor is split along its first dimension, and every list into its entries.
        """
        values = [result] if isinstance(result, Tensor) else result
        values = list(values.values()) if isinstance(values, Mapping) else values
        if not isinstance(values, tuple | list) or not values:
            return None
        if not all((isinstance(value, Tensor) and value.ndim > 0) or isinstance(value, list) for value in values):
            return None
        counts = {len(value) for value in values}
        if len(counts) != 1:
            return None
        (count,) = counts
        parts = [[value[place : place + 1] for value in values] for place in range(count)]
        if isinstance(result, Tensor):
            return [part[0] for part in parts]
        return [dict(zip(result, part, strict=True)) for part in parts] if isinstance(result, Mapping) else parts

    def compute(self) -> float:
        """The metric's value over all batches so far.

        Raises:
            ValueError: if the metric's result is no scalar.
        """
        value = self.metric.compute()
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"{type(self.metric).__name__} returned a tensor of shape {tuple(value.shape)}, not a scalar: "
                    "choose an averaged metric"
                )
            return float(value)
        if isinstance(value, int | float):
            return float(value)
        raise ValueError(f"{type(self.metric).__name__} returned a {type(value).__name__}, not a scalar")


def known_length(dataloader: Iterable[Any]) -> int | None:
    """The number of batches, or ``None`` if it is only known at the end, as of an iterable-style dataset."""
    if not isinstance(dataloader, Sized):
        return None
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        # A DataLoader has __len__ whatever its dataset; PyTorch names these two errors for one that has none.
        return None


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
