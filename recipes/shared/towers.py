"""The parts of a vision-language model: the language tower, the vision tower, and the projector between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

Part = Literal["language", "vision", "projector"]
Towers = Literal["language", "vision", "both"]

_PROJECTOR_WITHIN = ("merger", "connector", "projector")
"""Some vision towers end in the projector: Qwen-VL's ``visual.merger``."""


def parts_of(model: Any) -> dict[str, Part]:
    """Which part each parameter belongs to, by its name in ``named_parameters()``.

    The language tower is the model's decoder, its embeddings and its output layer, the vision tower its image
    encoder, as transformers finds them (``get_decoder``, ``get_encoder``); what is left is the projector. A model
    without an image encoder is one language tower.

    Raises:
        ValueError: if the model has images and no projector can be told from its towers.
    """
    decoder = model.get_decoder()
    encoder = model.get_encoder(modality="image")
    if encoder is model or encoder is decoder or encoder is getattr(model, "base_model", None):
        return {name: "language" for name, _ in model.named_parameters()}
    language = [decoder, *(m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None)]
    in_language, in_vision = _parameters(language), _parameters([encoder])
    parts: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in in_language:
            parts[name] = "language"
        elif id(parameter) in in_vision and not _names_projector(name):
            parts[name] = "vision"
        else:
            parts[name] = "projector"
    if "projector" not in parts.values():
        raise ValueError(f"{type(model).__name__} has no parameters between its vision tower and its language tower")
    return parts


def _parameters(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _names_projector(name: str) -> bool:
    return any(word in part for part in name.split(".") for word in _PROJECTOR_WITHIN)


def trained_parts(towers: Towers) -> set[Part]:
    """The parts that may train; the projector always does."""
    return {"projector", "language", "vision"} if towers == "both" else {"projector", towers}
