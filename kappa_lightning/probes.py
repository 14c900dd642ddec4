"""Probes: what the pretrained model could do, as a dataloader, a metric and a step between them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, SpearmanCorrCoef

from kappa_lightning.metrics import IGNORED, MeanCorrect, TokenPerplexity

Step = Callable[[Any, Any], Any]


class Probe:
    """A capability to keep: batches, a metric, and the step from a batch to what the metric takes.

    Args:
        dataloader: batches of any structure, the same each time it is iterated; a finite one.
        metric: a torchmetrics ``Metric`` with a scalar result; its ``higher_is_better`` decides the direction.
        step: ``step(module, batch)`` returns what ``metric.update`` takes: a tensor, a tuple of positional or a dict
            of keyword arguments. The module is in eval mode, without gradients, the batch on its device. Of several
            processes each runs it on a share of the batches.
        name: the metric's name in the logs; by default its class in snake case.

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
    """

    def __init__(self, dataloader: Iterable[Any], metric: Metric, step: Step, *, name: str | None = None) -> None:
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
        self.dataloader = dataloader
        self.metric = metric
        self.step = step
        self.name = name or _snake_case(type(metric).__name__)
        if self.name in ("retention", "forgetting"):
            raise ValueError(f"name={self.name!r} is the tag of another figure: choose another")

    @property
    def higher_is_better(self) -> bool:
        """The direction of the metric."""
        return bool(self.metric.higher_is_better)

    def prepare(self, batch: Any, convert: Callable[[Any], Any]) -> Any:
        """The batch with its inputs in the precision of the module; ``convert`` casts the floats of a collection."""
        return convert(batch)

    def update(self, module: nn.Module, batch: Any) -> None:
        """Run the step on a batch and give its result to the metric.

        Raises:
            TypeError: if the step returns something that ``metric.update`` cannot take.
        """
        result = self.step(module, batch)
        if isinstance(result, Tensor):
            self.metric.update(result)
        elif isinstance(result, Mapping):
            self.metric.update(**result)
        elif isinstance(result, tuple | list):
            self.metric.update(*result)
        else:
            raise TypeError(
                f"step returned a {type(result).__name__}; {type(self.metric).__name__}.update takes a tensor, a tuple "
                "of its positional arguments or a dict of its keyword arguments"
            )

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


class PerplexityProbe(Probe):
    """Perplexity of a causal language model, over all predicted tokens of all batches.

    A batch is a mapping with ``input_ids`` of shape (batch, tokens) and, optionally, ``attention_mask`` and ``labels``
    of the same shape. The token at position t + 1 is predicted from the logits at t. It counts if both positions are
    attended to, so that padding on either side changes nothing, and if its label is not −100. Models with absolute
    positions need ``position_ids`` in the batch when padding is on the left.

    Args:
        dataloader: the batches.
        logits: ``logits(module, batch)`` returns shape (batch, tokens, vocabulary); by default
            ``module(**batch without labels)`` or its attribute ``logits``.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[3, 1, 4, 1]])}
        >>> probe = PerplexityProbe([batch], logits=lambda module, batch: torch.zeros(1, 4, 10))
        >>> probe.update(torch.nn.Identity(), batch)
        >>> round(probe.compute(), 6)
        10.0
    """

    def __init__(self, dataloader: Iterable[Mapping[str, Any]], logits: Step | None = None) -> None:
        predict = logits or _causal_logits

        def step(module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise TypeError("PerplexityProbe needs batches that are mappings with an entry input_ids")
            return predict(module, batch)[:, :-1], next_token_labels(batch)

        super().__init__(dataloader, TokenPerplexity(), step, name="perplexity")


class SimilarityProbe(Probe):
    """Spearman correlation between the cosine similarity of two embeddings and a human score.

    A batch is ``(first, second, score)``: two collections that ``embed`` takes, and n scores in any unit. An encoder
    that gives all pairs the same similarity scores 0.

    Args:
        dataloader: the batches.
        embed: ``embed(module, first)`` returns embeddings of shape (n, dim).

    Example:
        >>> import torch
        >>> pairs = (torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0]]), torch.tensor([5.0, 3.0, 0.0]))
        >>> probe = SimilarityProbe([pairs], embed=lambda module, x: module(x))
        >>> probe.update(torch.nn.Identity(), pairs)
        >>> round(probe.compute(), 4)
        1.0
    """

    def __init__(self, dataloader: Iterable[tuple[Any, Any, Any]], embed: Step) -> None:
        def step(module: nn.Module, batch: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
            if not isinstance(batch, Sequence) or len(batch) != 3:
                raise TypeError("SimilarityProbe needs batches of the form (first, second, score)")
            first, second = embed(module, batch[0]), embed(module, batch[1])
            cosine = functional.cosine_similarity(first.float(), second.float(), dim=-1)
            return cosine, torch.as_tensor(batch[2], dtype=cosine.dtype, device=cosine.device)

        with warnings.catch_warnings():
            # It keeps every pair's two numbers until the end, as a rank correlation must; a few kilobytes here.
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions in the buffer")
            metric = SpearmanCorrCoef()
        super().__init__(dataloader, metric, step, name="spearman")

    def prepare(self, batch: Any, convert: Callable[[Any], Any]) -> Any:
        """As in :class:`Probe`, but the scores keep their precision: rounded ones would tie."""
        return (*convert(tuple(batch[:2])), *batch[2:]) if isinstance(batch, Sequence) else batch


class AccuracyProbe(Probe):
    """Share of samples whose class has the highest logit.

    A batch is ``(inputs, labels)``, or a mapping with ``labels`` and the keyword arguments of the module's forward.
    Labels of −100 do not count.

    Args:
        dataloader: the batches.
        logits: ``logits(module, batch)`` returns shape (..., classes) for labels of shape (...); by default
            ``module(inputs)`` or its attribute ``logits``.

    Example:
        >>> import torch
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 1]))
        >>> probe = AccuracyProbe([batch])
        >>> probe.update(torch.nn.Identity(), batch)
        >>> round(probe.compute(), 4)
        0.6667
    """

    def __init__(self, dataloader: Iterable[Any], logits: Step | None = None) -> None:
        predict = logits or _class_logits

        def step(module: nn.Module, batch: Any) -> Tensor:
            labels: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
            scores: Tensor = predict(module, batch)
            if scores.shape[:-1] != labels.shape or labels.is_floating_point():
                raise ValueError(
                    f"AccuracyProbe needs class numbers of shape {tuple(scores.shape[:-1])} for logits of shape "
                    f"{tuple(scores.shape)}, and the labels are {labels.dtype} of shape {tuple(labels.shape)}"
                )
            correct = scores.argmax(-1) == labels
            return torch.as_tensor(correct)[labels != IGNORED].float()

        super().__init__(dataloader, MeanCorrect(), step, name="accuracy")


def known_length(dataloader: Iterable[Any]) -> int | None:
    """The number of batches, or ``None`` if it is only known at the end, as of an iterable-style dataset."""
    if not isinstance(dataloader, Sized):
        return None
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        # A DataLoader has __len__ whatever its dataset; PyTorch names these two errors for one that has none.
        return None


def next_token_labels(batch: Mapping[str, Any]) -> Tensor:
    """The labels of positions 1 to T − 1, −100 where no token is to be predicted.

    Args:
        batch: ``input_ids`` of shape (batch, T), and optionally ``attention_mask`` and ``labels`` of the same shape.

    Returns:
        Shape (batch, T − 1).
    """
    labels: Tensor = batch["labels"] if batch.get("labels") is not None else batch["input_ids"]
    following = labels[:, 1:]
    mask = batch.get("attention_mask")
    if mask is not None:
        # A token after padding on the left has no context to be predicted from.
        following = following.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), IGNORED)
    return following


def _causal_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return _logits_of(module(**{key: value for key, value in batch.items() if key != "labels"}))


def _class_logits(module: nn.Module, batch: Any) -> Tensor:
    return _causal_logits(module, batch) if isinstance(batch, Mapping) else _logits_of(module(batch[0]))


def _logits_of(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the module's forward returned a {type(output).__name__}, which is neither a tensor nor has logits: give "
            "the probe a function logits(module, batch)"
        )
    return logits


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
