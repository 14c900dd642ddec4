"""What a model says about its outputs: distributions that can be sampled, and compared with what they were."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kappa_lightning.probes.distributions import describe, divergence

Described = dict[str, Tensor]

_ROWS = 1024
"""Rows whose probabilities are in memory at a time; a vocabulary of 100,000 makes 400 MB of them."""


class OutputDistribution(ABC):
    """n independent distributions that a model gives for one batch: one for each token, sample or pixel.

    Choose :class:`Categorical` for softmax, :class:`Bernoulli` for several labels, :class:`Gaussian` for regression,
    :func:`similarity` for contrastive models and :class:`Joint` for several heads, or derive from this.
    """

    @abstractmethod
    def __len__(self) -> int:
        """n, the number of distributions."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Any:
        """One outcome of each distribution, drawn with a generator on their device; as :meth:`log_prob` takes it."""

    @abstractmethod
    def log_prob(self, outcomes: Any) -> Tensor:
        """The natural logarithm of the probability (density) of each outcome, shape (n,), differentiable."""

    @abstractmethod
    def describe(self, top_k: int | None = None) -> Described:
        """What :meth:`divergence` needs to know of these distributions later, detached, on the CPU.

        Args:
            top_k: of a softmax, how many of the likeliest classes are kept; all if ``None``. Others ignore it.
        """

    def embed(self) -> Tensor:
        """These distributions as one point φ, a flat tensor whose squared distances are twice the summed divergence.

        To second order, ‖φ(p) − φ(q)‖² = 2·Σ KL(p ‖ q) nats; for probabilities p the entries are 2√p (Amari &
        Nagaoka, Methods of Information Geometry, section 2.5). Needed for ``method="path"`` of a sensitivity.

        Raises:
            TypeError: if a class does not say it.
        """
        raise TypeError(f'{type(self).__name__} defines no embed(): define it, or use method="gradient"')

    @abstractmethod
    def divergence(self, reference: Described) -> Tensor:
        """KL(p ‖ q) in nats of these distributions q from what they were, p, shape (n,), differentiable.

        Args:
            reference: what :meth:`describe` gave of p.
        """


class Categorical(OutputDistribution):
    """The softmax of logits over the last dimension.

    Args:
        logits: shape (…, classes).
        counts: shape (…), which of the distributions count; all if ``None``.

    Example:
        >>> p, q = (Categorical(torch.tensor([w]).log()) for w in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
        >>> round(q.divergence(p.describe()).item() / 0.6931472, 4)
        0.25
        >>> round(p.log_prob(torch.tensor([0])).exp().item(), 4)
        0.5
    """

    def __init__(self, logits: Tensor, counts: Tensor | None = None) -> None:
        self.logits = logits.flatten(0, -2) if counts is None else logits[counts.bool()]

    def __len__(self) -> int:
        return len(self.logits)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Class numbers, shape (n,)."""
        parts = torch.split(self.logits.detach(), _ROWS)
        drawn = [torch.multinomial(part.float().softmax(-1), 1, generator=generator).squeeze(-1) for part in parts]
        return torch.cat(drawn)

    def log_prob(self, outcomes: Tensor) -> Tensor:
        """Of class numbers, shape (n,)."""
        return -functional.cross_entropy(self.logits.float(), outcomes, reduction="none")

    def describe(self, top_k: int | None = None) -> Described:
        """See :func:`kappa_lightning.probes.distributions.describe`."""
        return describe(self.logits.detach(), top_k)

    def embed(self) -> Tensor:
        """Of all rows and classes, 2√p.

        Example:
            >>> p, q = (Categorical(torch.tensor([[w, 1 - w]]).log()) for w in (0.5, 0.501))
            >>> round((p.embed() - q.embed()).square().sum().item() / (2 * q.divergence(p.describe()).item()), 1)
            1.0
        """
        return 2 * self.logits.float().softmax(-1).sqrt().flatten()

    def divergence(self, reference: Described) -> Tensor:
        """See :func:`kappa_lightning.probes.distributions.divergence`."""
        return divergence(reference, self.logits)


class Bernoulli(OutputDistribution):
    """Independent labels that each hold or not, as in multi-label classification: n samples with some labels each.

    Args:
        logits: shape (n, …), the logit of each label.

    Example:
        >>> fair = Bernoulli(torch.zeros(1, 3))
        >>> round(fair.log_prob(torch.ones(1, 3)).exp().item(), 4)
        0.125
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.flatten(1).float()

    def __len__(self) -> int:
        return len(self.logits)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Zeros and ones, shape (n, labels)."""
        return torch.bernoulli(self.logits.detach().sigmoid(), generator=generator)

    def log_prob(self, outcomes: Tensor) -> Tensor:
        """Of zeros and ones, shape (n, labels)."""
        return -functional.binary_cross_entropy_with_logits(self.logits, outcomes, reduction="none").sum(-1)

    def describe(self, top_k: int | None = None) -> Described:
        """The logits."""
        return {"logits": self.logits.detach().cpu()}

    def embed(self) -> Tensor:
        """Of all rows and labels, 2√p and 2√(1 − p)."""
        return 2 * torch.stack([self.logits.sigmoid(), (-self.logits).sigmoid()]).sqrt().flatten()

    def divergence(self, reference: Described) -> Tensor:
        """Σ over labels of p ln(p/q) + (1 − p) ln((1 − p)/(1 − q))."""
        before = reference["logits"].to(self.logits.device)
        p, log = before.sigmoid(), functional.logsigmoid
        nats = p * (log(before) - log(self.logits)) + (1 - p) * (log(-before) - log(-self.logits))
        return nats.sum(-1).clamp_min(0)


class Gaussian(OutputDistribution):
    """Regression: n samples whose outputs are Gaussian around what the model says, with one known scale.

    Args:
        mean: shape (n, …), what the model says.
        scale: standard deviation of an output around it, in the output's unit; broadcasts to the shape of ``mean``.

    Example:
        >>> p, q = Gaussian(torch.zeros(1, 2), 2.0), Gaussian(torch.tensor([[2.0, 0.0]]), 2.0)
        >>> q.divergence(p.describe()).item()
        0.5
    """

    def __init__(self, mean: Tensor, scale: float | Tensor = 1.0) -> None:
        self.mean = mean.flatten(1).float() if mean.ndim > 1 else mean[:, None].float()
        spread = torch.as_tensor(scale, dtype=torch.float32, device=mean.device)
        if not bool((spread > 0).all()):
            raise ValueError(f"scale={scale} must be positive: it is a standard deviation")
        self.scale = spread.expand(mean.shape).reshape(self.mean.shape)

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Outputs, shape (n, outputs)."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean.detach() + self.scale * noise

    def log_prob(self, outcomes: Tensor) -> Tensor:
        """Of outputs, shape (n, outputs)."""
        standard = (outcomes - self.mean) / self.scale
        constant = self.scale.log() + 0.918938533204673  # ½ ln 2π
        return -(standard.square() / 2 + constant).sum(-1)

    def describe(self, top_k: int | None = None) -> Described:
        """The means."""
        return {"mean": self.mean.detach().cpu()}

    def embed(self) -> Tensor:
        """Of all rows and outputs, the mean in units of the scale."""
        return (self.mean / self.scale).flatten()

    def divergence(self, reference: Described) -> Tensor:
        """Σ over outputs of (μ_p − μ_q)² / 2σ², the scale being these distributions' for both."""
        before = reference["mean"].to(self.mean.device)
        return ((self.mean - before) / self.scale).square().sum(-1) / 2


class Joint(OutputDistribution):
    """Several independent outputs of one model, such as the heads of a multi-task network, one after the other.

    Args:
        parts: distributions with n_1, n_2, … rows; together they have Σ n_i.
    """

    def __init__(self, parts: Sequence[OutputDistribution]) -> None:
        self.parts = list(parts)
        if not self.parts:
            raise ValueError("parts is empty: give at least one distribution")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sample(self, generator: torch.Generator) -> list[Any]:
        """A list of what each part gives."""
        return [part.sample(generator) for part in self.parts]

    def log_prob(self, outcomes: list[Any]) -> Tensor:
        """Of what :meth:`sample` gave."""
        each = zip(self.parts, outcomes, strict=True)
        return torch.cat([part.log_prob(drawn) for part, drawn in each])

    def describe(self, top_k: int | None = None) -> Described:
        """What each part gives, with its number in front of the names."""
        each = [part.describe(top_k) for part in self.parts]
        return {f"{number}.{name}": value for number, kept in enumerate(each) for name, value in kept.items()}

    def embed(self) -> Tensor:
        """Those of the parts, one after the other."""
        return torch.cat([part.embed() for part in self.parts])

    def divergence(self, reference: Described) -> Tensor:
        """Those of the parts, one after the other."""
        return torch.cat([part.divergence(_of(number, reference)) for number, part in enumerate(self.parts)])


def similarity(logits: Tensor) -> OutputDistribution:
    """The two softmaxes of a contrastive model such as CLIP: over the texts of an image, over the images of a text.

    Args:
        logits: shape (images, texts), cosine similarities over the temperature.

    Example:
        >>> len(similarity(torch.zeros(2, 3)))
        5
    """
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: give a matrix of similarities")
    return Joint([Categorical(logits), Categorical(logits.T)])


def _of(number: int, reference: Mapping[str, Tensor]) -> Described:
    start = f"{number}."
    return {name.removeprefix(start): value for name, value in reference.items() if name.startswith(start)}
