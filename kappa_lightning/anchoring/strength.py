"""The weight of the anchor: a number, or what holds a budget of divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_CLIP = 1.0


class Strength:
    """A fixed weight, or a dual variable that rises while a divergence is above its budget and falls below it.

    The update is multiplicative, as in the adaptive KL controller of Ziegler et al., "Fine-Tuning Language Models from
    Human Preferences" (arXiv 1909.08593), section 2.2: after a step with divergence D and budget B

        ln λ ← ln λ + rate · clip(D/B − 1, −1, 1),

    within a factor of ``span`` of where it began, so that it neither vanishes while nothing has moved yet nor runs away
    where the budget cannot be held.

    Args:
        initial: λ at the beginning.
        budget: B in nats; ``None`` keeps λ.
        rate: how fast it moves.
        span: how far it goes.

    Example:
        >>> import torch
        >>> strength = Strength(1.0, budget=0.02, rate=0.1)
        >>> strength.update(torch.tensor(0.05))
        >>> round(strength.value, 4)
        1.1052
    """

    def __init__(self, initial: float, budget: float | None = None, *, rate: float = 0.1, span: float = 100.0) -> None:
        self.budget = budget
        self.rate = rate
        self.initial = initial
        self._limits = (initial / span, initial * span)
        self._value: float | Tensor = float(initial)

    @property
    def value(self) -> float:
        """λ now."""
        return float(self._value)

    @property
    def is_zero(self) -> bool:
        """Whether it is fixed at nothing."""
        return self.budget is None and self.initial == 0

    def factor(self, device: torch.device) -> float | Tensor:
        """λ as a factor of a loss on a device, without waiting for it."""
        if self.budget is None:
            return float(self._value)
        # Always a tensor of one precision, so that a resumed run rounds as the first one did.
        return torch.as_tensor(self._value, dtype=_precision(device), device=device)

    def update(self, divergence: Tensor) -> None:
        """Move λ by a divergence in nats, the same on all processes; one that is not finite moves nothing."""
        if self.budget is None:
            return
        kind = _precision(divergence.device)
        value = torch.as_tensor(self._value, dtype=kind, device=divergence.device)
        excess = (divergence.detach().to(kind) / self.budget - 1).clamp(-_CLIP, _CLIP).nan_to_num(0.0)
        self._value = (value * torch.exp(self.rate * excess)).clamp(*self._limits)

    def state_dict(self) -> dict[str, Any]:
        """λ, for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's λ; a fixed weight stays what it is."""
        if self.budget is not None:
            self._value = float(state["value"])


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def check_strength(strength: float, max_divergence: float | None, rate: float) -> None:
    """Refuse arguments that mean nothing.

    Raises:
        ValueError: with the argument, what was found, and what is allowed.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength!r} must be a number of at least 0")
    if max_divergence is not None:
        if not isinstance(max_divergence, int | float) or not 0 < max_divergence < math.inf:
            raise ValueError(f"max_divergence={max_divergence!r} must be a number of nats above 0")
        if strength == 0:
            raise ValueError("strength=0 cannot be raised to hold max_divergence: give the strength to begin with")
    if not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ValueError(f"adaptation_rate={rate!r} must be in (0, 1]")
