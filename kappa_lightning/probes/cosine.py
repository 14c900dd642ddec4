"""Agreement of an encoder's similarities with human scores as a probe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import SpearmanCorrCoef

from kappa_lightning.probes.probe import Probe, Step


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
        >>> _ = probe.update(torch.nn.Identity(), pairs)
        >>> round(probe.compute(), 4)
        1.0
    """

    def __init__(self, dataloader: Iterable[tuple[Any, Any, Any]], embed: Step) -> None:
        self._embed = embed
        with warnings.catch_warnings():
            # It keeps every pair's two numbers until the end, as a rank correlation must; a few kilobytes here.
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions in the buffer")
            metric = SpearmanCorrCoef()
        super().__init__(dataloader, metric, self._similarities, name="spearman")

    def prepare(self, batch: Any, convert: Callable[[Any], Any]) -> Any:
        """As in :class:`Probe`, but the scores keep their precision: rounded ones would tie."""
        return (*convert(tuple(batch[:2])), *batch[2:]) if isinstance(batch, Sequence) else batch

    def _similarities(self, module: nn.Module, batch: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, Sequence) or len(batch) != 3:
            raise TypeError("SimilarityProbe needs batches of the form (first, second, score)")
        first, second = self._embed(module, batch[0]), self._embed(module, batch[1])
        cosine = functional.cosine_similarity(first.float(), second.float(), dim=-1)
        return cosine, torch.as_tensor(batch[2], dtype=cosine.dtype, device=cosine.device)
