"""The way from the pretrained weights to the trained ones, and a module at any point of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kappa_lightning.anchoring.pretrained import PretrainedState, local, tracked
from kappa_lightning.anchoring.spectral_filter import FilteredUpdate
from kappa_lightning.parts import store_parts
from kappa_lightning.processes import Processes
from kappa_lightning.weights import find_weights
from kappa_lightning.weights.patterns import match_names
from kappa_lightning.weights.roles import depth_and_role
from kappa_lightning.weights.sharded import is_sharded

Along = Literal["all", "role", "depth", "singular_values"]

_LORA_B = re.compile(r"\blora_((?:embedding_)?)B\b")
_STATISTICS = re.compile(r"\brunning_(?:mean|var)$")

Factors = Mapping[str, float]
"""For each group of tensors how much of its update is left: 0 is pretrained, 1 is trained."""


class WalkPath:
    """Sets a module's weights to points between what they were and what they are.

    A tensor is at θ₀ + α(θ₁ − θ₀); both ends are exact to the last bit. Of a LoRA adapter that began as the identity
    (B = 0) the *product* follows that line: its B is scaled and its A stays as trained. Running means and variances of
    normalization layers are interpolated as well.

    Args:
        module: trained; a copy of what trained is kept on the CPU.
        pretrained: what trained, as it was.
        along: ``"all"`` has one factor; ``"role"`` one for all tensors whose names differ only in numbers;
            ``"depth"`` one for each stretch of layers; ``"singular_values"`` one, by which small singular values of
            each matrix' update are dropped (:class:`~kappa_lightning.anchoring.spectral_filter.FilteredUpdate`).
        depth_groups: the number of stretches.
        exclude: globs of what stays as trained at every point, such as a head that is new.

    Attributes:
        groups: the names of the factors.

    Raises:
        TypeError: if a tensor is quantized.
        ValueError: if an adapter was not the identity when training began, ``along="singular_values"`` meets a
            sharded tensor or an adapter, or ``exclude`` matches nothing or all; nothing has been changed then.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> start = PretrainedState()
        >>> _ = start.add(layer)
        >>> _ = torch.nn.init.constant_(layer.weight, 2.0)
        >>> path = WalkPath(layer, start)
        >>> path.go_to({"all": 0.25})
        >>> layer.weight.item()
        0.5
    """

    def __init__(
        self,
        module: nn.Module,
        pretrained: PretrainedState,
        along: Along = "all",
        *,
        depth_groups: int = 3,
        exclude: Sequence[str] = (),
    ) -> None:
        if along not in get_args(Along):
            raise ValueError(f"along={along!r} is unknown: use one of {', '.join(map(repr, get_args(Along)))}")
        if not len(pretrained):
            raise ValueError("nothing has trained, so there is no way back")
        self._module = module
        tensors = tracked(module, every=True)
        self._tensors = {name: tensors[name] for name in walked(pretrained, exclude)}
        self._pretrained = pretrained
        self._scaled, self._kept = _adapters(self._tensors, pretrained)
        self._filters: dict[str, FilteredUpdate] = {}
        if along == "singular_values":
            self._require_plain()
        # What stays as trained has no factor: to look for one would cost measurements that all say the same.
        self._group_of = groups_of([name for name in self._tensors if name not in self._kept], along, depth_groups)
        self.groups = tuple(dict.fromkeys(self._group_of.values()))
        self._trained = {name: local(tensor).to("cpu", copy=True) for name, tensor in self._tensors.items()}
        if along == "singular_values":
            weights = {weight.name: weight for weight in find_weights(module)}
            for name, tensor in self._tensors.items():
                if name in weights:
                    trained = self._trained[name]
                    update = _wide(trained, trained) - _wide(pretrained[name], trained)
                    self._filters[name] = FilteredUpdate(update, weights[name].view, tensor.device)

    def go_to(self, factors: Factors | float) -> None:
        """Put the module there.

        Args:
            factors: one for each of :attr:`groups`, or one for all, each in [0, 1].
        """
        with torch.no_grad():
            for name, group in self._group_of.items():
                factor = factors[group] if isinstance(factors, Mapping) else factors
                here = local(self._tensors[name])
                here.copy_(self._value(name, factor, here))
            store_parts(self._module)

    def _value(self, name: str, factor: float, here: Tensor) -> Tensor:
        trained, start = self._trained[name], self._pretrained[name]
        if factor == 1:
            return trained
        if factor == 0:
            return start
        if name in self._scaled:
            return _wide(trained, here) * factor
        if name in self._filters:
            return _wide(start, here) + self._filters[name].at(factor).to(here.device, _wide(start, here).dtype)
        return between(_wide(start, here), _wide(trained, here), factor)

    def _require_plain(self) -> None:
        for name, tensor in self._tensors.items():
            if is_sharded(tensor):
                raise ValueError(
                    f"{name} is sharded over processes, and singular values are those of the whole: use another way, "
                    "or walk back the saved checkpoint with kappa-lightning walk-back"
                )
            if name in self._scaled or name in self._kept:
                raise ValueError(f'{name} is an adapter\'s, which along="singular_values" does not reach: use "all"')


def walked(names: Iterable[str], exclude: Sequence[str]) -> list[str]:
    """The tensors that go along the way: all that trained but for those that ``exclude`` matches.

    Raises:
        ValueError: if a glob matches none of them, or together they match all.

    Example:
        >>> walked(["body.weight", "head.weight"], ["head.*"])
        ['body.weight']
    """
    names = list(names)
    left = match_names(names, exclude, argument="exclude", aliases={})
    remaining = [name for name in names if name not in left]
    if not remaining:
        raise ValueError(f"exclude={list(exclude)} matches all that trains: nothing would walk back")
    return remaining


def between(start: Tensor, end: Tensor, factor: float) -> Tensor:
    """start + factor · (end − start), exact at both ends.

    Example:
        >>> import torch
        >>> between(torch.tensor(1.0), torch.tensor(3.0), 0.25).item()
        1.5
    """
    return torch.lerp(start, end, factor)


def _wide(tensor: Tensor, here: Tensor) -> Tensor:
    """In float32 or better, since half precision would round what lies between."""
    return tensor.to(here.device, torch.promote_types(tensor.dtype, torch.float32))


def _adapters(tensors: Mapping[str, Tensor], pretrained: PretrainedState) -> tuple[set[str], set[str]]:
    """Which tensors of LoRA adapters are scaled, and which stay as trained."""
    scaled, kept = set(), set()
    for name in tensors:
        partner = _LORA_B.sub(r"lora_\1A", name)
        if partner == name or partner not in tensors:
            continue
        began = bool(pretrained[name].any())
        if is_sharded(tensors[name]):
            began = any(Processes.of_this_run().gather(began))
        if began:
            raise ValueError(
                f"{name} was not zero when training began, so scaling its adapter does not lead back to the pretrained "
                "model: merge the adapter that was there into the base before training"
            )
        scaled.add(name)
        kept.add(partner)
    return scaled, kept


def groups_of(names: Sequence[str], along: Along, depth_groups: int) -> dict[str, str]:
    """For each tensor the name of its factor; see :class:`WalkPath`."""
    if along in ("all", "singular_values"):
        return dict.fromkeys(names, along)
    if along == "role":
        # Statistics of a normalization layer fit its weight at the same point, not at another.
        return {name: depth_and_role(_STATISTICS.sub("weight", name))[1] for name in names}
    depths = sorted({depth for name in names if (depth := depth_and_role(name)[0]) is not None})
    stretches: dict[int, str] = {}
    count = min(depth_groups, len(depths))
    for place in range(count):
        stretch = depths[place * len(depths) // count : (place + 1) * len(depths) // count]
        label = f"layers {stretch[0]}–{stretch[-1]}" if len(stretch) > 1 else f"layer {stretch[0]}"
        stretches |= dict.fromkeys(stretch, label)
    return {name: "no layer" if (depth := depth_and_role(name)[0]) is None else stretches[depth] for name in names}
