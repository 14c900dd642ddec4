"""The model that diffusers makes of a checkpoint, on the meta device, and its tensors by the names in that model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.weights.checkpoint.config import UNBUILDABLE, NoModelError, reason_of
from kappa_lightning.weights.checkpoint.stored import Stored


def build_diffusers(content: Mapping[str, Any]) -> nn.Module:
    """The model of a ``config.json`` of diffusers, without values: one of its own classes, and no other code.

    Raises:
        NoModelError: if diffusers is not installed or makes no model of it.
    """
    try:
        import diffusers
    except ImportError as error:
        raise NoModelError("the config.json beside it needs diffusers, which is not installed") from error
    made_by, named = f"diffusers {diffusers.__version__}", content["_class_name"]
    kind = getattr(diffusers, named, None) if isinstance(named, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise NoModelError(f"{made_by} has no model {named!r}, which the config.json beside it names")
    try:
        with torch.device("meta"):
            return kind.from_config(dict(content))  # type: ignore[no-untyped-call, no-any-return]
    except UNBUILDABLE as error:
        raise NoModelError(f"{made_by} makes no model of the config.json beside it ({reason_of(error)})") from error


class DiffusersTensors:
    """The tensors of a checkpoint by the names that they have in a model of diffusers."""

    def __init__(self, model: Any, tensors: Mapping[str, Stored]) -> None:
        renamed = OrderedDict(tensors)
        # Attention of older autoencoders had other names. It has no public name itself.
        model._fix_state_dict_keys_on_load(renamed)
        expected = model.state_dict()
        self._tensors = {name: stored for name, stored in renamed.items() if name in expected}

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape in the model."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Its stored precision."""
        return self._tensors[name].dtype or torch.uint8

    def refusal(self, name: str) -> str | None:
        """Why it cannot be read, if it cannot."""
        return self._tensors[name].refusal

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Reads it."""
        return self._tensors[name].read
