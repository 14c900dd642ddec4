"""κ of each expert of a layer, whichever way a model keeps them, for a picture with a strip for each layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from kappa_lightning.profile import KappaProfile
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.profile.settings import EXPERTS
from kappa_lightning.weights import Weight
from kappa_lightning.weights.groups import group_members
from kappa_lightning.weights.part import split_name

_SEPARATE = re.compile(r"(?P<before>.*\bexperts)\.(?P<number>\d+)\.(?P<after>.+)")

Strips = dict[str, dict[int, float]]
"""For each tensor of a layer's experts the κ of each by its number."""


@dataclass(slots=True)
class ExpertKappas:
    """The latest κ of every expert that is watched.

    Attributes:
        names: the tensors that hold experts.
        fused: for each fused tensor the κ of its experts, in their order.
    """

    names: Collection[str] = ()
    fused: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def watch(self, module: nn.Module, weights: Mapping[str, Weight]) -> None:
        """Take note of which of some weights are experts."""
        self.names = group_members("@experts", weights, module)
        self.fused = {name: kappas for name, kappas in self.fused.items() if name in self.names}

    def note(self, row: KappaRow) -> None:
        """A tensor has been decomposed."""
        if row.kappas is not None and row.name in self.names:
            self.fused[row.name] = row.kappas

    def known(self, profile: KappaProfile, weights: Mapping[str, Weight]) -> dict[str, float]:
        """κ of those of some weights that a profile tells, also if it has a row for each expert in place of theirs."""
        kappas: dict[str, float] = {}
        for name, weight in weights.items():
            parts = [f"{name}[{number}]" for number in range(weight.shape[0])] if weight.is_stack else []
            if name in profile:
                kappas[name] = profile[name].kappa
                self.note(profile[name])
            elif parts and all(part in profile for part in parts):
                each = tuple(profile[part].kappa for part in parts)
                kappas[name] = EXPERTS[profile.settings.combine](each)
                if name in self.names:
                    self.fused[name] = each
        return kappas

    def strips(self, kappas: Mapping[str, float]) -> Strips:
        """The strips, of experts that are tensors of their own as well.

        Args:
            kappas: κ of each tensor.

        Example:
            >>> experts = ExpertKappas(names={"experts.0.up.weight", "experts.1.up.weight"})
            >>> experts.strips({"experts.0.up.weight": 3.0, "experts.1.up.weight": 5.0, "head.weight": 2.0})
            {'experts.*.up.weight': {0: 3.0, 1: 5.0}}
        """
        found: Strips = {name: dict(enumerate(values)) for name, values in self.fused.items() if name in kappas}
        for name, kappa in kappas.items():
            separate = _SEPARATE.fullmatch(name) if name in self.names else None
            if separate is not None:
                whole = f"{separate['before']}.*.{separate['after']}"
                found.setdefault(whole, {})[int(separate["number"])] = kappa
        return {name: values for name, values in found.items() if len(values) > 1}

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint needs: frozen experts are not decomposed again."""
        return {name: list(kappas) for name, kappas in self.fused.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """The inverse of :meth:`state`."""
        self.fused = {name: tuple(kappas) for name, kappas in state.items()}


def experts_that_train(names: Collection[str]) -> set[tuple[str, int]]:
    """The strip and the number of every expert among the names of what trains.

    Example:
        >>> sorted(experts_that_train(["mlp.experts.down_proj[3:gate]", "mlp.experts.0.w1.weight", "head.weight"]))
        [('mlp.experts.*.w1.weight', 0), ('mlp.experts.down_proj', 3)]
    """
    found = set()
    for name in names:
        whole, label = split_name(name)
        number = (label or "").partition(":")[0]
        separate = _SEPARATE.fullmatch(name)
        if number.isdigit():
            found.add((whole, int(number)))
        elif separate is not None:
            found.add((f"{separate['before']}.*.{separate['after']}", int(separate["number"])))
    return found
