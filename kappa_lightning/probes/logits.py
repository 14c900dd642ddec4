"""The logits of whatever a module's forward returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def causal_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of a module that takes a batch as keyword arguments; labels are kept from it."""
    return logits_of(module(**{key: value for key, value in batch.items() if key != "labels"}))


def class_logits(module: nn.Module, batch: Any) -> Tensor:
    """Of a module that takes a batch as keyword arguments, or its first entry."""
    return causal_logits(module, batch) if isinstance(batch, Mapping) else logits_of(module(batch[0]))


def logits_of(output: Any) -> Tensor:
    """The output itself, or its attribute ``logits``.

    Raises:
        TypeError: if it is neither a tensor nor has logits.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the module's forward returned a {type(output).__name__}, which is neither a tensor nor has logits: give "
            "the probe a function logits(module, batch)"
        )
    return logits
