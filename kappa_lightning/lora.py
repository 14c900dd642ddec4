"""Where PEFT should put LoRA adapters: on the tensors that a profile selects."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from kappa_lightning.profile import KappaProfile, KappaRow
from kappa_lightning.weights.part import split_name

if TYPE_CHECKING:
    from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow

_WEIGHT = ".weight"
_ADAPTABLE = (nn.Linear, nn.Embedding, _ConvNd)


def lora_targets(
    profile: KappaProfile | SensitivityProfile, *, model: nn.Module | None = None, **budget: Any
) -> dict[str, Any]:
    """The targets of PEFT's ``LoraConfig``, so that only the tensors within a budget get an adapter.

    A layer's weight makes its layer one of ``target_modules``; a parameter that belongs to no layer of its own, such
    as the fused experts of a mixture-of-experts layer, of shape (experts, rows, cols), is one of
    ``target_parameters``. PEFT also adapts every module whose name ends in a dot and a target. Where that would reach
    one that was not selected, ``target_modules`` is a regular expression, which PEFT matches in full.

    Args:
        profile: of the very model that gets the adapters, so that the names are those of its parameters: condition
            numbers, or signals and sensitivities.
        model: that model; needed only where it has matrices called ``weight`` in layers that PEFT cannot wrap, such
            as the routers of a mixture of experts, which then become ``target_parameters``.
        **budget: ``top_p``, ``num_tensors``, ``max_kappa`` or ``max_params``, and ``criterion``, as in
            :meth:`KappaProfile.select <kappa_lightning.KappaProfile.select>`, or those of
            :meth:`SensitivityProfile.select <kappa_lightning.SensitivityProfile.select>`, which needs none; the
            budget counts the tensors that get an adapter and their parameters, not the adapters'.

    Returns:
        ``target_modules`` and ``target_parameters``, ready for ``LoraConfig(**targets, r=8)``; each may be empty.

    Raises:
        TypeError: if ``profile`` is no profile, or has no budget of such a name.
        ValueError: if there is not exactly one budget or it selects nothing, a tensor is not a layer's ``weight`` and
            has neither two nor three dimensions, only some experts or heads of a tensor are selected, or PEFT could not
            tell a parameter from one that was not selected.
        KeyError: if ``model`` does not have a tensor of the profile.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"up": nn.Linear(2, 8), "down": nn.Linear(8, 2)})
        >>> profile = KappaProfile.from_model(model, progress=False)
        >>> lora_targets(profile, top_p=1.0) == {"target_modules": ["down", "up"], "target_parameters": []}
        True
    """
    _require_budget(profile, budget)
    layers = None if model is None else dict(model.named_modules(remove_duplicate=False))
    selected = set(profile.select(**budget))
    wholes: dict[str, KappaRow | SensitivityRow] = {split_name(row.name)[0]: row for row in profile}
    _require_wholes(profile, selected)
    chosen = {split_name(name)[0] for name in selected}
    is_layer = {name: _is_layers_weight(name, row, layers) for name, row in wholes.items()}
    modules = sorted(name.removesuffix(_WEIGHT) for name in chosen if is_layer[name])
    parameters = sorted(name for name in chosen if not is_layer[name])
    for name in parameters:
        # Each expert of a fused tensor is a matrix.
        shape = wholes[name].shape if wholes[name].name == name else (1, *wholes[name].shape)
        if len(shape) not in (2, 3):
            raise ValueError(f"PEFT cannot adapt {name} of shape {shape}: profile the model with exclude=[{name!r}]")
    others = [name for name in wholes if name not in chosen]
    if reached := _reached(parameters, others):
        raise ValueError(
            f"PEFT would also adapt {reached[1]}, whose name ends in .{reached[0]}: profile the model inside a module "
            "that gives both a longer name, or exclude the shorter one"
        )
    not_chosen = [name.removesuffix(_WEIGHT) for name in others]
    exact = "|".join(map(re.escape, modules)) if _reached(modules, not_chosen) else None
    return {"target_modules": exact or modules, "target_parameters": parameters}


def _require_budget(profile: Any, budget: Mapping[str, Any]) -> None:
    """Raise a TypeError if something is no profile, or its ``select`` takes no argument of such a name."""
    if not callable(select := getattr(profile, "select", None)):
        raise TypeError(f"profile is a {type(profile).__name__}: give a KappaProfile or a SensitivityProfile")
    known = inspect.signature(select).parameters
    for name, value in budget.items():
        if name not in known:
            hint = ": give one of these, or a KappaProfile" if name in ("criterion", "max_kappa") else ""
            raise TypeError(
                f"{name}={value!r} is no budget of a {type(profile).__name__}, which takes {', '.join(known)}{hint}"
            )


def _require_wholes(profile: KappaProfile | SensitivityProfile, selected: set[str]) -> None:
    """Raise a ValueError if some parts of a tensor are selected, and others are not."""
    left = {split_name(row.name)[0]: row.name for row in profile if row.name not in selected}
    for name in sorted(selected):
        whole, label = split_name(name)
        if label is not None and whole in left:
            raise ValueError(
                f"{name} is selected and {left[whole]} is not, and PEFT adapts all of {whole} or nothing: profile the "
                'model with experts="mean" and heads="whole" to choose whole tensors, or train the selected parts '
                'themselves with KappaFreezeCallback(experts="each")'
            )


def _is_layers_weight(name: str, row: KappaRow | SensitivityRow, layers: Mapping[str, nn.Module] | None) -> bool:
    if not name.endswith(_WEIGHT):
        return False
    if layers is None:
        is_expert = row.name != name and "head" not in row.name.rpartition("[")[2]
        return not is_expert and (not isinstance(row, KappaRow) or row.kappas is None)
    layer = layers.get(name.removesuffix(_WEIGHT))
    if layer is None:
        raise KeyError(f"the model has no {name}: it is not the one that was profiled")
    return isinstance(layer, _ADAPTABLE)


def _reached(targets: Sequence[str], others: Sequence[str]) -> tuple[str, str] | None:
    """The first target that PEFT would also find in the name of something else, and that."""
    return next(((target, other) for target in targets for other in others if other.endswith(f".{target}")), None)
