"""The weights of a checkpoint as the model has them that transformers or diffusers makes of it by the config beside it.

The model is built on the meta device, where it has layers and no values; a weight is read from the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kappa_lightning.weights.checkpoint.config import Loaded, NoModelError, read_config
from kappa_lightning.weights.checkpoint.diffusers_model import DiffusersTensors, build_diffusers
from kappa_lightning.weights.checkpoint.stored import Stored
from kappa_lightning.weights.checkpoint.transformers_model import TransformersTensors, build_transformers
from kappa_lightning.weights.model import find_weights
from kappa_lightning.weights.names import tied_names
from kappa_lightning.weights.weight import Weight


def configured_weights(folder: Path, tensors: Mapping[str, Stored]) -> list[Weight]:
    """The matrices of the model that transformers or diffusers would make of a checkpoint, those that it holds.

    Args:
        folder: where ``config.json`` lies.
        tensors: what the checkpoint holds.

    Raises:
        NoModelError: if there is no config, the library is not installed or does not know the model without running
            code of the checkpoint, or the config is not this checkpoint's.
    """
    model, named = _model(folder, len(tensors))
    loaded = named(model, tensors)
    shared = {f"{name.split('.')[0]}." for name in tensors}
    if not len(loaded) and len(shared) == 1:  # module. of DataParallel, net. of a LightningModule
        bare = {name.removeprefix(*shared): tensor for name, tensor in tensors.items()}
        loaded = named(model, bare)
    aliases: dict[str, list[str]] = {}
    for alias, first in tied_names(model).items():
        aliases.setdefault(first, []).append(alias)
    weights = []
    for weight in find_weights(model):
        name = next((name for name in (weight.name, *aliases.get(weight.name, ())) if name in loaded), None)
        if name is None:
            continue  # new in this model: the library initializes it
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


def _model(folder: Path, count: int) -> tuple[nn.Module, Callable[[Any, Mapping[str, Stored]], Loaded]]:
    content = read_config(folder, count)
    if "model_type" in content:
        return build_transformers(folder), TransformersTensors
    if "_class_name" in content:
        return build_diffusers(content), DiffusersTensors
    raise NoModelError("the config.json beside it is neither of transformers nor of diffusers")


def _made(model: nn.Module, weight: Weight, loaded: Loaded) -> Weight:
    """A weight that its layer makes from several tensors, made by a copy of the layer that holds them."""
    parts = weight.name.split(".")
    place = parts.index("parametrizations") if "parametrizations" in parts else len(parts) - 1
    prefix = "".join(f"{part}." for part in parts[:place])
    layer = model.get_submodule(prefix.rstrip("."))
    held = [name for name, _ in layer.state_dict(keep_vars=True).items() if prefix + name in loaded]
    dtype = loaded.dtype(weight.name)

    def filled() -> Weight:
        copied = copy.deepcopy(layer)
        state = {name: loaded.reader(prefix + name)() for name in held}
        copied.load_state_dict(state, strict=False, assign=True)
        (found,) = (each for each in find_weights(copied) if each.name == weight.name.removeprefix(prefix))
        return found

    def sources() -> tuple[Tensor, ...]:
        found = filled()
        assert found.sources is not None
        return found.sources()

    return replace(weight, dtype=dtype, read=lambda: filled().read(), parameter=None, makers=(), sources=sources)
