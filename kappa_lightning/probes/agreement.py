"""Agreement of a causal language model with what it was before fine-tuning, as a probe that needs no labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.arguments import as_count
from kappa_lightning.probes.content import content_key
from kappa_lightning.probes.distributions import describe, divergence
from kappa_lightning.probes.logits import causal_logits
from kappa_lightning.probes.metrics import TokenAgreement
from kappa_lightning.probes.probe import Probe, Step
from kappa_lightning.probes.references import References

_SAME_MODEL = 1e-3
"""Nats a token: far above what kernels and precisions differ by, far below what fine-tuning does."""

_NO_REFERENCE = (
    "there is no reference for this batch, and recording one on weights that are trained already would hide what they "
    "forgot. The dataloader must give the same batches each time (no shuffling, no random transforms, the precision of "
    "the first run); a run that is resumed by several processes needs directory=…, a folder that all of them see"
)


class AgreementProbe(Probe):
    """How far a model's next-token distributions are from those it had before fine-tuning, on unlabeled input.

    The metric is the agreement exp(−D), with D the mean over all tokens of the Kullback–Leibler divergence
    KL(p ‖ q) = Σ p ln(p/q), in nats, of the present distribution q from the pretrained model's own p. Before the first
    step it is 1, so ``ForgettingEval``'s retention is the agreement itself; a divergence has no retention, as its
    baseline is 0. The scale is that of :class:`PerplexityProbe`: the agreement is the retention of the perplexity, on
    average over text that the pretrained model would write.

    p is recorded in the pass that measures the baseline, and kept under a fingerprint of its batch. So batches may
    come in another order, and each of several processes may record and compare its own share. A batch that was not
    there then is an error.

    - *Exact:* with ``top_k=None`` all of p is kept: 4 bytes for each token of the input and of the vocabulary
      (a vocabulary of 50,000 makes it 0.2 MB a token).
    - *An approximation:* with ``top_k=k`` only p's k likeliest tokens and the mass of all others are kept, 8k + 4
      bytes a token. The divergence is then that of distributions in which those others count as one token, never
      more than the exact one.

    References in memory go into every checkpoint (with several processes: the first one's). With a ``directory`` they
    are files there, and a checkpoint holds only their names. Files are never overwritten: several runs from the same
    pretrained weights share a folder, and a folder with another model's references is an error.

    A batch is a mapping with ``input_ids`` of shape (batch, tokens) and, optionally, ``attention_mask`` and whatever
    else the model takes, such as images. Every token that is attended to counts, those that stand for an image as well.
    To leave them out, give the model's own inputs under another name, ``logits=lambda model, batch:
    model(**batch["inputs"]).logits``, and an ``attention_mask`` of the positions that count.

    Args:
        dataloader: the batches, the same each time.
        logits: ``logits(module, batch)`` returns shape (batch, tokens, vocabulary); by default
            ``module(**batch without labels)`` or its attribute ``logits`` (where the batch is a
            mapping and the module has no forward, of the transformers model in it).
        top_k: how many of p's likeliest tokens are kept; all if ``None``.
        max_bytes: what the references of one process may take, in memory or on disk.
        directory: the folder to keep them in; in memory if ``None``.

    Raises:
        TypeError: if a batch is no mapping with ``input_ids``.
        ValueError: if an argument is out of range; in an evaluation, if the references do not fit into ``max_bytes``,
            a batch has none, or the folder has those of another model.

    Example:
        >>> import torch
        >>> model = torch.nn.Embedding(10, 10)
        >>> batch = {"input_ids": torch.tensor([[3, 1, 4, 1]])}
        >>> probe = AgreementProbe([batch], logits=lambda model, batch: model(batch["input_ids"]))
        >>> def agreement():
        ...     probe.metric.reset()
        ...     probe.update(model, batch)
        ...     return round(probe.compute(), 6)
        >>> probe.begin_baseline()
        >>> agreement()
        1.0
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> agreement() < 1
        True
    """

    def __init__(
        self,
        dataloader: Iterable[Mapping[str, Any]],
        logits: Step | None = None,
        *,
        top_k: int | None = None,
        max_bytes: int = 2**30,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self.top_k = None if top_k is None else as_count(top_k, "top_k")
        self._references = References(as_count(max_bytes, "max_bytes"), directory)
        self._recording = False
        self._logits = logits or causal_logits
        super().__init__(dataloader, TokenAgreement(), self._divergences, name="agreement")

    def begin_baseline(self) -> None:
        """Forget what was recorded, and record with the next pass over the batches."""
        self._references.clear()
        self._recording = True

    def compute(self) -> float:
        """The agreement over all batches so far; what has been recorded until now is the reference from here on."""
        self._recording = False
        return super().compute()

    def state_dict(self) -> dict[str, Any]:
        """The references, or with a ``directory`` their names there."""
        if self._references.directory is not None:
            return {"keys": self._references.keys()}
        return {"references": self._references.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the references of the run that is resumed.

        Raises:
            ValueError: if they do not fit into ``max_bytes``, or are files that are not in ``directory``.
        """
        self._references.clear()
        self._recording = False
        for key, reference in state.get("references", {}).items():
            self._references.add(key, reference)
        for key in state.get("keys", ()):
            reference = self._references.get(key)
            if reference is None:
                raise ValueError(
                    f"the run that is resumed kept its reference {key} in a folder, and it is not in "
                    f"directory={self._references.directory}: give the folder of that run"
                )
            self._references.adopt(key, reference)

    def split(self, result: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
        """The divergences of each sequence, since the tokens of one are no independent samples."""
        mask = batch.get("attention_mask")
        lengths = [batch["input_ids"].shape[1]] * len(batch["input_ids"]) if mask is None else mask.sum(1).tolist()
        return [part for part in torch.split(result, lengths) if len(part)]

    def loss_of(self, module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean divergence from what the model was, in nats a token."""
        return self._divergences(module, batch).mean()

    def _divergences(self, module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError("AgreementProbe needs batches that are mappings with an entry input_ids")
        reference = self._references.get(key := batch_key(batch))
        if reference is None and not self._recording:
            raise ValueError(_NO_REFERENCE)
        scores: Tensor = self._logits(module, batch)
        mask = batch.get("attention_mask")
        attended = scores.flatten(0, 1) if mask is None else scores[mask.bool()]
        if reference is None:
            reference = describe(attended, self.top_k)
            self._references.add(key, reference)
            return divergence(reference, attended)
        self._require_same_kind(reference, attended)
        nats = divergence(reference, attended)
        if self._recording:
            self._adopt(key, reference, nats)
        return nats

    def _require_same_kind(self, reference: dict[str, Tensor], attended: Tensor) -> None:
        kept = reference["log_p"].shape
        width = attended.shape[-1] if self.top_k is None else min(self.top_k, attended.shape[-1])
        if kept != (attended.shape[0], width):
            raise ValueError(
                f"the reference of this batch has {kept[0]} tokens with {kept[1]} probabilities each, and top_k="
                f"{self.top_k} now makes it {attended.shape[0]} with {width}: use the top_k and the model of the run "
                "that recorded it"
            )

    def _adopt(self, key: str, reference: dict[str, Tensor], nats: Tensor) -> None:
        # A batch that occurs twice in one pass comes here as well.
        if nats.numel() and not nats.mean() <= _SAME_MODEL:
            raise ValueError(
                f"directory={self._references.directory} holds the references of another model, from which this one "
                f"diverges by {nats.mean():.3g} nats a token before its first step: give an empty folder"
            )
        self._references.adopt(key, reference)


def batch_key(batch: Mapping[str, Any]) -> str:
    """A name for the content of a batch, the same in every process and on every device.

    Example:
        >>> import torch
        >>> one, other = ({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[n]])} for n in (1, 2))
        >>> batch_key(one) == batch_key(other), batch_key(one) == batch_key({"input_ids": torch.tensor([[2, 1]])})
        (True, False)
    """
    return content_key(batch, but=("labels",))
