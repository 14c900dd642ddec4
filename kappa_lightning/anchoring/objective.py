"""The divergence of a module from the pretrained one on a batch, from what was recorded or from a pass with θ₀."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kappa_lightning.anchoring.losses import cross_entropy, kl_from_logits, kl_from_reference
from kappa_lightning.anchoring.outputs import rows_and_targets
from kappa_lightning.anchoring.pretrained import PretrainedState, call_pretrained
from kappa_lightning.probes.inputs import ReferenceInputs
from kappa_lightning.probes.output import Categorical, Described, OutputDistribution
from kappa_lightning.probes.references import References

Kind = Literal["kl", "cross_entropy"]


class Objective:
    """Sums of nats over the rows of a batch, with a gradient for the module as it is.

    Args:
        kind: ``"kl"`` is KL(p ‖ q) of the present distribution q from the pretrained p; ``"cross_entropy"`` is
            −ln q(target) less what it was before training. On text that was drawn from p itself, that is an unbiased
            estimate of the same divergence.
        exclude_target: whether the class that the batch says is right is left out of p and q.
        inputs: what a module says of a batch.
        top_k: how many classes of p are recorded; all if ``None``.
        references: where they are kept.

    Raises:
        ValueError: if ``kind`` is unknown, or ``exclude_target`` is asked of recorded distributions of few classes or
            of the cross-entropy.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        exclude_target: bool = False,
        inputs: ReferenceInputs,
        top_k: int | None = None,
        references: References,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"divergence={kind!r} is unknown: use one of {', '.join(map(repr, get_args(Kind)))}")
        if exclude_target and kind == "cross_entropy":
            raise ValueError("exclude_target=True leaves nothing of a cross-entropy: use divergence='kl'")
        if exclude_target and top_k is not None:
            raise ValueError("exclude_target=True needs whole distributions: leave top_k out")
        self.kind = kind
        self.exclude_target = exclude_target
        self.inputs = inputs
        self.top_k = top_k
        self.references = references

    def describe(self, module: nn.Module, batch: Any) -> Described:
        """What is to be recorded of the pretrained module on a batch, on the CPU; nothing is kept yet."""
        with torch.no_grad():
            if self.kind == "cross_entropy":
                return {"nats": self._cross_entropies(module, batch).cpu()}
            if self.exclude_target:
                return Categorical(rows_and_targets(self.inputs, module, batch)[0]).describe()
            return self.inputs.distribution(module, batch).describe(self.top_k)

    def recorded(self, module: nn.Module, batch: Any, key: str) -> tuple[Tensor, int]:
        """The divergence from what was recorded under a key.

        Returns:
            The sum over the rows, in nats, and their number.

        Raises:
            ValueError: if nothing was recorded, or for another number of rows.
        """
        reference = self.references.get(key)
        if reference is None:
            raise ValueError(f"there is no recorded reference {key}: the batches must be those of the start")
        if self.kind == "cross_entropy":
            now = self._cross_entropies(module, batch)
            _require_rows(reference["nats"], len(now))
            nats = now - reference["nats"].to(now.device)
        elif self.exclude_target:
            rows, targets = rows_and_targets(self.inputs, module, batch)
            _require_rows(reference["log_p"], len(rows))
            nats = kl_from_logits(reference["log_p"].to(rows.device), rows, targets)
        else:
            found = self.inputs.distribution(module, batch)
            if isinstance(found, Categorical):
                _require_rows(reference["log_p"], len(found))
                nats = kl_from_reference(reference, found.logits)
            else:
                nats = found.divergence(reference)
        return nats.sum(), len(nats)

    def forward(self, module: nn.Module, batch: Any, state: PretrainedState) -> tuple[Tensor, int]:
        """The divergence from a pass of the pretrained module; see :meth:`recorded`."""
        if self.kind == "cross_entropy":
            before = call_pretrained(module, state, self._cross_entropies, batch)
            nats = self._cross_entropies(module, batch) - before
        elif self.exclude_target:
            pretrained, _ = call_pretrained(module, state, self._rows, batch)
            rows, targets = self._rows(module, batch)
            nats = kl_from_logits(pretrained, rows, targets)
        else:
            was: OutputDistribution = call_pretrained(module, state, self.inputs.distribution, batch)
            now = self.inputs.distribution(module, batch)
            if isinstance(was, Categorical) and isinstance(now, Categorical):
                nats = kl_from_logits(was.logits, now.logits)
            else:
                nats = now.divergence(was.describe())
        return nats.sum(), len(nats)

    def _rows(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return rows_and_targets(self.inputs, module, batch)

    def _cross_entropies(self, module: nn.Module, batch: Any) -> Tensor:
        rows, targets = rows_and_targets(self.inputs, module, batch)
        return cross_entropy(rows[targets >= 0], targets[targets >= 0])


def _require_rows(recorded: Tensor, now: int) -> None:
    if len(recorded) != now:
        raise ValueError(
            f"{len(recorded)} distributions were recorded of a batch that has {now} now: the batches must be those of "
            "the start"
        )


def bytes_of(reference: Mapping[str, Tensor]) -> int:
    """What a recorded reference takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in reference.values())


def estimated_bytes(first: int, samples: Sequence[int]) -> int:
    """What all references will take, from what that of the first batch does and how many samples each has."""
    return first * sum(samples) // max(1, samples[0])
