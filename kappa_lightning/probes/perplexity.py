"""Perplexity of a causal language model as a probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from kappa_lightning.probes.logits import causal_logits
from kappa_lightning.probes.metrics import IGNORED, TokenPerplexity
from kappa_lightning.probes.probe import Probe, Step


class PerplexityProbe(Probe):
    """Perplexity of a causal language model, over all predicted tokens of all batches.

    A batch is a mapping with ``input_ids`` of shape (batch, tokens) and, optionally, ``attention_mask`` and ``labels``
    of the same shape. The token at position t + 1 is predicted from the logits at t. It counts if both positions are
    attended to, so that padding on either side changes nothing, and if its label is not −100. Models with absolute
    positions need ``position_ids`` in the batch when padding is on the left.

    Args:
        dataloader: the batches.
        logits: ``logits(module, batch)`` returns shape (batch, tokens, vocabulary); by default
            ``module(**batch without labels)`` or its attribute ``logits`` (where the batch is a
            mapping and the module has no forward, of the transformers model in it).
        chance: the perplexity of a model that knows nothing of the text, such as one that knows how frequent each token
            is (at most the number of tokens in the vocabulary).

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[3, 1, 4, 1]])}
        >>> probe = PerplexityProbe([batch], logits=lambda module, batch: torch.zeros(1, 4, 10))
        >>> _ = probe.update(torch.nn.Identity(), batch)
        >>> round(probe.compute(), 6)
        10.0
    """

    def __init__(
        self, dataloader: Iterable[Mapping[str, Any]], logits: Step | None = None, *, chance: float | None = None
    ) -> None:
        self._logits = logits or causal_logits
        super().__init__(dataloader, TokenPerplexity(), self._predictions, name="perplexity", chance=chance)

    def _predictions(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError("PerplexityProbe needs batches that are mappings with an entry input_ids")
        return self._logits(module, batch)[:, :-1], next_token_labels(batch)

    def loss_of(self, module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean negative log-likelihood of the predicted tokens, in nats."""
        scores, labels = self._predictions(module, batch)
        return functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


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
