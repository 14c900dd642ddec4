"""The model that transformers makes of a checkpoint, on the meta device, and its tensors by the names in that model.

What transformers does to a file's tensors when it loads them (other names, experts fused, projections split) is done to
them when a weight is read, by transformers' own rules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.weights.checkpoint.config import UNBUILDABLE, NoModelError, reason_of
from kappa_lightning.weights.checkpoint.stored import Stored


def build_transformers(folder: Path) -> nn.Module:
    """The model of a folder's ``config.json``, without values and with no code of the checkpoint's.

    Raises:
        NoModelError: if transformers is not installed or makes no model of it.
    """
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError as error:
        raise NoModelError("the config.json beside it needs transformers, which is not installed") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = next(iter(getattr(config, "architectures", None) or ()), None)
        architecture = getattr(transformers, named, None) if isinstance(named, str) else None
        with torch.device("meta"):
            if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                return architecture(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return, no-untyped-call]
    except (*UNBUILDABLE, StrictDataclassError) as error:
        made_by = f"transformers {transformers.__version__}"
        raise NoModelError(f"{made_by} makes no model of the config.json beside it ({reason_of(error)})") from error


@dataclass(frozen=True, slots=True, eq=False)
class _Conversion:
    """What transformers makes one or several tensors of a model from.

    Attributes:
        start: a fresh converter and the name that it is called for; ``None`` if a tensor is only renamed.
        sources: the stored tensors, each with the pattern that it matched.
    """

    start: Callable[[], Any] | None
    sources: list[tuple[str, Stored]]


class TransformersTensors:
    """The tensors of a checkpoint by the names that they have in the loaded model."""

    def __init__(self, model: Any, tensors: Mapping[str, Stored]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._model = model
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        expected, prefix = model.state_dict(), model.base_model_prefix
        conversions: dict[str, _Conversion] = {}
        for name in sorted(tensors, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if key not in expected and name in expected:
                key, pattern = name, None
            if key not in expected:
                continue
            start = None if pattern is None else partial(copy.deepcopy, by_pattern[pattern])
            conversion = conversions.setdefault(key, _Conversion(start, []))
            conversion.sources.append((pattern or name, tensors[name]))
        self._held: dict[str, tuple[str, _Conversion, tuple[int, ...], torch.dtype]] = {}
        for key, conversion in conversions.items():
            for name, (shape, dtype) in self._described(key, conversion).items():
                self._held[name] = (key, conversion, shape, dtype)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape in the model."""
        return self._held[name][2]

    def dtype(self, name: str) -> torch.dtype:
        """Its stored precision."""
        return self._held[name][3]

    def refusal(self, name: str) -> str | None:
        """Why it cannot be read, if it cannot."""
        return next((stored.refusal for _, stored in self._held[name][1].sources if stored.refusal), None)

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Reads it."""
        key, conversion, _, _ = self._held[name]
        return partial(self._read, name, key, conversion)

    def _read(self, name: str, key: str, conversion: _Conversion) -> Tensor:
        with torch.device("cpu"), torch.no_grad():
            return self._converted(key, conversion, lambda stored: stored.read())[name]

    def _described(self, key: str, conversion: _Conversion) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The names, shapes and precisions of what a conversion makes."""
        refused = [stored for _, stored in conversion.sources if stored.refusal or stored.dtype is None]
        if refused or conversion.start is None:
            stored = refused[0] if refused else conversion.sources[0][1]
            return {key: (stored.shape, stored.dtype or torch.uint8)}

        def empty(stored: Stored) -> Tensor:
            return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

        try:
            made = self._converted(key, conversion, empty)
        except UNBUILDABLE as error:
            raise NoModelError(f"transformers cannot convert its tensors to {key} ({error})") from error
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}

    def _converted(self, key: str, conversion: _Conversion, read: Callable[[Stored], Tensor]) -> dict[str, Tensor]:
        if conversion.start is None:
            return {key: read(conversion.sources[0][1])}
        converter = conversion.start()
        for pattern, stored in conversion.sources:
            converter.add_tensor(key, stored.name, pattern, partial(read, stored))
        made = converter.convert(key, model=self._model, config=self._model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
