"""The logits of whatever a module's forward returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def causal_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of a module that takes a batch as keyword arguments, or of the transformers model in a module without a forward.

    Labels are kept from it.

    Raises:
        TypeError: if there is neither a forward nor such a model, or it returns no logits.
    """
    model = transformers_model(module) if has_no_forward(module) else module
    if model is None:
        raise TypeError(
            f"{type(module).__name__} neither defines a forward nor holds a transformers model that returns logits: "
            "define forward, or give the probe a function logits(module, batch)"
        )
    return logits_of(model(**{key: value for key, value in batch.items() if key != "labels"}))


def class_logits(module: nn.Module, batch: Any) -> Tensor:
    """Of a module that takes a batch as keyword arguments, or its first entry.

    Raises:
        TypeError: if the module has no forward, or it returns no logits.
    """
    if isinstance(batch, Mapping):
        return causal_logits(module, batch)
    if has_no_forward(module):
        raise TypeError(
            f"{type(module).__name__} defines no forward: define it, or give the probe a function logits(module, batch)"
        )
    return logits_of(module(batch[0]))


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


def transformers_model(module: nn.Module) -> Any | None:
    """The outermost model of transformers that has a head: one that is made for something."""
    for submodule in module.modules():
        config = getattr(submodule, "config", None)
        if hasattr(config, "is_encoder_decoder") and hasattr(type(submodule), "from_pretrained"):
            returned = str(inspect.signature(type(submodule).forward).return_annotation)
            if "For" in type(submodule).__name__ or "LMHead" in type(submodule).__name__ or "LM" in returned:
                return submodule
    return None


def has_no_forward(module: nn.Module) -> bool:
    """Whether a module inherits only the forward that raises."""
    # LightningModule defines one that only hands on to nn.Module's, which raises.
    defined = getattr(type(module).forward, "__qualname__", "")
    return defined.startswith(("LightningModule.", "Module.", "_forward_unimplemented"))
