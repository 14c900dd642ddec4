"""The weights of a checkpoint as the model has them that transformers makes of it by the config beside it.

The model is built on the meta device, where it has layers and no values. What transformers does to a file's tensors
when it loads them (other names, experts fused, projections split) is done to them when a weight is read, by
transformers' own rules.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.weights.checkpoint.stored import Stored
from kappa_lightning.weights.model import find_weights
from kappa_lightning.weights.names import tied_names
from kappa_lightning.weights.weight import Weight


class NoModelError(Exception):
    """There is no model to take the layers from; the message says why, as the beginning of a sentence."""


def configured_weights(folder: Path, tensors: Mapping[str, Stored]) -> list[Weight]:
    """The matrices of the model that transformers would make of a checkpoint, those that the checkpoint holds.

    Args:
        folder: where ``config.json`` lies.
        tensors: what the checkpoint holds.

    Raises:
        NoModelError: if there is no config, transformers is not installed or does not know the model without running
            code of the checkpoint, or the config is not this checkpoint's.
    """
    model = _build(folder, len(tensors))
    loaded = _Loaded(model, tensors)
    shared = {f"{name.split('.')[0]}." for name in tensors}
    if not len(loaded) and len(shared) == 1:  # module. of DataParallel, net. of a LightningModule
        bare = {name.removeprefix(*shared): tensor for name, tensor in tensors.items()}
        loaded = _Loaded(model, bare)
    aliases: dict[str, list[str]] = {}
    for alias, first in tied_names(model).items():
        aliases.setdefault(first, []).append(alias)
    weights = []
    for weight in find_weights(model):
        name = next((name for name in (weight.name, *aliases.get(weight.name, ())) if name in loaded), None)
        if name is None:
            continue  # new in this model: transformers initializes it
        if weight.is_made:
            weights.append(_made(model, weight, loaded))
        elif loaded.shape(name) == weight.shape:
            read, refusal = loaded.reader(name), loaded.refusal(name)
            weights.append(replace(weight, dtype=loaded.dtype(name), read=read, parameter=None, refusal=refusal))
        else:
            raise NoModelError(
                f"the config.json beside it is another model's ({weight.name} has shape {weight.shape} by it and "
                f"{loaded.shape(name)} in the checkpoint)"
            )
    if not weights:
        raise NoModelError("the config.json beside it is another model's (none of its weights is in the checkpoint)")
    return weights


def _build(folder: Path, count: int) -> nn.Module:
    file = folder / "config.json"
    if not file.is_file():
        raise NoModelError("no config.json beside it says what its layers are")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NoModelError(f"the config.json beside it is damaged ({error})") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise NoModelError("the config.json beside it is not of transformers")
    if _depth(content) > count:
        raise NoModelError("the config.json beside it is another model's (more layers than the checkpoint has tensors)")
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
    except (*_UNBUILDABLE, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        made_by = f"transformers {transformers.__version__}"
        raise NoModelError(f"{made_by} makes no model of the config.json beside it ({reason})") from error


def _depth(content: Any) -> int:
    """The largest number of layers that a config names, at whatever depth."""
    if not isinstance(content, dict):
        return 0
    named = [value for key, value in content.items() if _LAYERS.search(key) and isinstance(value, int)]
    return max([0, *named, *map(_depth, content.values())])


_LAYERS = re.compile(r"layers?$|^depth$")
# A model is built by code of its own, which fails in its own ways on a config that it does not know.
_UNBUILDABLE = (
    ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, RuntimeError, AssertionError,
    ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Conversion:
    """What transformers makes one or several tensors of a model from.

    Attributes:
        start: a fresh converter and the name that it is called for; ``None`` if a tensor is only renamed.
        sources: the stored tensors, each with the pattern that it matched.
    """

    start: Callable[[], Any] | None
    sources: list[tuple[str, Stored]]


class _Loaded:
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
        return self._held[name][2]

    def dtype(self, name: str) -> torch.dtype:
        return self._held[name][3]

    def refusal(self, name: str) -> str | None:
        return next((stored.refusal for _, stored in self._held[name][1].sources if stored.refusal), None)

    def reader(self, name: str) -> Callable[[], Tensor]:
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
        except _UNBUILDABLE as error:
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


def _made(model: nn.Module, weight: Weight, loaded: _Loaded) -> Weight:
    """A weight that its layer makes from several tensors, made by a copy of the layer that holds them."""
    parts = weight.name.split(".")
    place = parts.index("parametrizations") if "parametrizations" in parts else len(parts) - 1
    prefix = "".join(f"{part}." for part in parts[:place])
    layer = model.get_submodule(prefix.rstrip("."))
    held = [name for name, _ in layer.state_dict(keep_vars=True).items() if prefix + name in loaded]
    dtype = loaded.dtype(weight.name)

    def read() -> Tensor:
        filled = copy.deepcopy(layer)
        state = {name: loaded.reader(prefix + name)() for name in held}
        filled.load_state_dict(state, strict=False, assign=True)
        (found,) = (each for each in find_weights(filled) if each.name == weight.name.removeprefix(prefix))
        return found.read()

    return replace(weight, dtype=dtype, read=read, parameter=None, makers=())
