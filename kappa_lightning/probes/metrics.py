"""The metrics of the ready-made probes, where torchmetrics has none that fits."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric, Metric

IGNORED = -100
"""The label of a token that is not predicted, as in PyTorch's cross-entropy and in transformers."""

_TOKENS = 1024


class _MeanNats(Metric):
    """Nats of all batches, and the number of tokens that they are of."""

    is_differentiable = False
    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")


class TokenPerplexity(_MeanNats):
    """exp of the mean negative log-likelihood over all predicted tokens, of all batches together.

    Unlike torchmetrics' ``Perplexity`` it never forms probabilities, so an unlikely token costs its true number of
    nats instead of −ln 0, and sums in float64 where the device has it.

    Example:
        >>> import torch
        >>> metric = TokenPerplexity()
        >>> metric.update(torch.zeros(1, 3, 7), torch.tensor([[4, 2, -100]]))
        >>> round(metric.compute().item(), 6)
        7.0
    """

    higher_is_better = False

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: shape (batch, tokens, vocabulary), already aligned with the labels they predict.
            labels: shape (batch, tokens), −100 where no token is predicted.
        """
        self.nats = self.nats.to(_sums_in(logits))
        # Part by part, since a vocabulary of 100,000 makes a float32 copy of a batch's logits many gigabytes.
        parts, targets = (torch.split(flat, _TOKENS) for flat in (logits.flatten(0, 1), labels.reshape(-1)))
        for part, target in zip(parts, targets, strict=True):
            losses = functional.cross_entropy(part.float(), target, ignore_index=IGNORED, reduction="none")
            self.nats += losses.to(self.nats.dtype).sum()
            self.tokens += (target != IGNORED).sum()

    def compute(self) -> Tensor:
        """The perplexity; NaN if no token was predicted."""
        return torch.exp(self.nats / self.tokens)


class MeanCorrect(MeanMetric):
    """The share of correct predictions: a mean that knows that higher is better.

    Example:
        >>> import torch
        >>> metric = MeanCorrect()
        >>> metric.update(torch.tensor([1.0, 0.0, 1.0, 1.0]))
        >>> metric.compute().item()
        0.75
    """

    higher_is_better = True  # type: ignore[assignment]


class TokenAgreement(_MeanNats):
    """exp(−D), with D the mean Kullback–Leibler divergence over all tokens, in nats: 1 is the same distribution.

    Example:
        >>> import math, torch
        >>> metric = TokenAgreement()
        >>> metric.update(torch.tensor([0.0, 2.0]))
        >>> round(metric.compute().item(), 6) == round(math.exp(-1), 6)
        True
    """

    higher_is_better = True

    def update(self, nats: Tensor) -> None:
        """Add the divergence of each token, shape (n,)."""
        self.nats = self.nats.to(_sums_in(nats))
        self.nats += nats.to(self.nats.dtype).sum()
        self.tokens += nats.numel()

    def compute(self) -> Tensor:
        """The agreement; NaN without a token."""
        return torch.exp(-self.nats / self.tokens)


def _sums_in(tensor: Tensor) -> torch.dtype:
    """float64 keeps a long sum exact; MPS has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class TextExactMatch(Metric):
    """The share of texts that are the wanted ones, spaces at the ends apart.

    Example:
        >>> metric = TextExactMatch()
        >>> metric.update(["Paris ", "Rome"], ["Paris", "Oslo"])
        >>> metric.compute().item()
        0.5
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("score", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, written: list[str], wanted: list[str]) -> None:
        """Add texts, as many wanted as written."""
        self.score += sum(self.of_one(one, other) for one, other in zip(written, wanted, strict=True))
        self.total += len(written)

    def compute(self) -> Tensor:
        """The mean over all texts."""
        return self.score / self.total

    def of_one(self, written: str, wanted: str) -> float:
        """The score of one text."""
        return float(written.strip() == wanted.strip())


class RougeL(TextExactMatch):
    """ROUGE-L: the F measure of the longest common subsequence of words (Lin, 2004), a mean over the texts.

    Words are runs of letters and digits, in lower case, as in Google's ``rouge_score``.

    Example:
        >>> metric = RougeL()
        >>> metric.update(["the cat sat"], ["The cat is here."])
        >>> round(metric.compute().item(), 4)
        0.5714
    """

    def of_one(self, written: str, wanted: str) -> float:
        """F of one text: 2·LCS over the number of words in both."""
        one, other = (re.findall(r"\w+", text.lower()) for text in (written, wanted))
        longest = [0] * (len(other) + 1)
        for word in one:
            row = [0]
            for place, wanted_word in enumerate(other):
                row.append(longest[place] + 1 if word == wanted_word else max(longest[place + 1], row[-1]))
            longest = row
        return 2 * longest[-1] / (len(one) + len(other)) if one and other else 0.0
