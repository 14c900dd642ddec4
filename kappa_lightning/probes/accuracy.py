"""Accuracy of a classifier as a probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kappa_lightning.probes.logits import class_logits
from kappa_lightning.probes.metrics import IGNORED, MeanCorrect
from kappa_lightning.probes.probe import Probe, Step


class AccuracyProbe(Probe):
    """Share of samples whose class has the highest logit.

    A batch is ``(inputs, labels)``, or a mapping with ``labels`` and the keyword arguments of the module's forward.
    Labels of −100 do not count.

    Args:
        dataloader: the batches.
        logits: ``logits(module, batch)`` returns shape (..., classes) for labels of shape (...); by default
            ``module(inputs)`` or its attribute ``logits`` (where the batch is a
            mapping and the module has no forward, of the transformers model in it).
        chance: the accuracy of guessing. ``"uniform"`` is one over the number of classes; where one label is much more
            frequent than the others, give its share. ``None`` leaves it open.

    Example:
        >>> import torch
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 1]))
        >>> probe = AccuracyProbe([batch])
        >>> _ = probe.update(torch.nn.Identity(), batch)
        >>> round(probe.compute(), 4)
        0.6667
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        logits: Step | None = None,
        *,
        chance: float | Literal["uniform"] | None = "uniform",
    ) -> None:
        self._logits = logits or class_logits
        self._classes: int | None = None
        self._is_uniform = chance == "uniform"
        known = None if isinstance(chance, str) and self._is_uniform else chance
        super().__init__(dataloader, MeanCorrect(), self._correct, name="accuracy", chance=known)  # type: ignore[arg-type]

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; with ``"uniform"`` known once a batch has been measured."""
        if self._is_uniform:
            return None if self._classes is None else 1 / self._classes
        return super().chance

    def loss_of(self, module: nn.Module, batch: Any) -> Tensor:
        """The cross-entropy of the labels, in nats."""
        scores, labels = self._scored(module, batch)
        return functional.cross_entropy(scores.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)

    def _scored(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        labels: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
        scores: Tensor = self._logits(module, batch)
        if scores.shape[:-1] != labels.shape or labels.is_floating_point():
            raise ValueError(
                f"AccuracyProbe needs class numbers of shape {tuple(scores.shape[:-1])} for logits of shape "
                f"{tuple(scores.shape)}, and the labels are {labels.dtype} of shape {tuple(labels.shape)}"
            )
        return scores, labels

    def _correct(self, module: nn.Module, batch: Any) -> Tensor:
        scores, labels = self._scored(module, batch)
        self._classes = scores.shape[-1]
        correct = scores.argmax(-1) == labels
        return torch.as_tensor(correct)[labels != IGNORED].float()
