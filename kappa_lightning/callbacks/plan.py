"""What a freeze is going to do, decided before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kappa_lightning.processes import Processes
from kappa_lightning.tables import Group
from kappa_lightning.weights import find_weights, plain_parameters
from kappa_lightning.weights.part import Part, split_name


class Row(Protocol):
    """One candidate in a profile."""

    @property
    def name(self) -> str:
        """The parameter's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""


class Profile(Protocol):
    """What the candidates were chosen by: a row for each."""

    def __iter__(self) -> Iterator[Any]:
        """The rows, each a :class:`Row`."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain Python values, for a checkpoint."""


AnyProfile = TypeVar("AnyProfile", bound=Profile)


@dataclass(frozen=True, slots=True)
class Choice(Generic[AnyProfile]):
    """Which candidates train.

    Attributes:
        selected: their names, the first to train first.
        profile: of all candidates.
        rates: for a candidate's name the factor of its learning rate; 1 for every tensor that is not named. ``None``
            leaves the optimizers' rates alone.
        parts: of those names that are of a part of a parameter (an expert, a head), the part.
    """

    selected: list[str]
    profile: AnyProfile
    rates: Mapping[str, float] | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan(Generic[AnyProfile]):
    """What becomes of each parameter that the callback is in charge of.

    Attributes:
        trained: the names of what trains.
        frozen: the names of what does not.
        dropped: those of them that leave the optimizers; what was frozen before stays in its group.
        selected: the candidates that were selected, the first to train first.
        profile: of the candidates.
        thawed: names of what another callback had thawed in the run that is resumed.
        rates: factors of learning rates by name; see :class:`Choice`.
        parts: what trains of parameters that are frozen otherwise; their names are in ``trained``, too.
    """

    trained: set[str]
    frozen: set[str]
    dropped: set[str]
    selected: list[str]
    profile: AnyProfile
    thawed: set[str] = field(default_factory=set)
    rates: dict[str, float] | None = None
    parts: tuple[Part, ...] = ()

    def require_same(self, processes: Processes) -> None:
        """Make sure that all processes train the same tensors; they would wait for each other's gradients for ever.

        Raises:
            RuntimeError: if they do not; the message names a tensor.
        """
        plans = processes.gather((sorted(self.trained), self.rates))
        for other, (trained, rates) in enumerate(plans):
            differing = set(trained) ^ set(plans[0][0])
            if differing:
                raise RuntimeError(
                    f"the processes of rank 0 and {other} do not train the same tensors, {min(differing)} first: the "
                    "module must be the same on both, with the same requires_grad"
                )
            if rates != plans[0][1]:
                raise RuntimeError(
                    f"the processes of rank 0 and {other} would train with different learning rates: the figures that "
                    "they come from must be the same on both"
                )

    def groups(
        self, module: nn.Module, *, label: str, train_vectors: bool, figures: Mapping[str, float]
    ) -> list[Group]:
        """The parameters by what becomes of them, for a table.

        Args:
            module: has the parameters.
            label: what the candidates were ranked by.
            train_vectors: whether the vectors that train do so for being vectors.
            figures: of the candidates by name.
        """
        parameters = plain_parameters(module)
        # A lazy layer's parameter has no size yet.
        sizes = {name: 0 if isinstance(p, UninitializedParameter) else p.numel() for name, p in parameters.items()}
        # A part is a candidate in the place of its whole.
        sizes |= {row.name: math.prod(row.shape) for row in self.profile if row.name not in sizes}
        rows = {row.name for row in self.profile}
        divided = {split_name(name)[0] for name in rows} - rows
        made_of: dict[str, tuple[str, ...]] = {name: (name,) for name in rows}
        made_of |= {weight.name: (weight.name, *weight.companions) for weight in find_weights(module)}
        matrices = {name for names in made_of.values() for name in names}
        chosen = set(self.selected)
        selected = {name for candidate in chosen for name in made_of[candidate]}
        passed = {name for row in self.profile if row.name not in chosen for name in made_of[row.name]}
        rest = [name for name in parameters if name in self.trained and name not in selected]
        frozen = [name for name in parameters if name in self.frozen and name not in passed | divided]
        return [
            Group.of(f"trains: selected by {label}", selected, sizes, figures),
            Group.of("trains: always_train", [n for n in rest if not train_vectors or n in matrices], sizes),
            Group.of("trains: vectors", [n for n in rest if train_vectors and n not in matrices], sizes),
            Group.of(f"frozen by {label}", passed, sizes, figures),
            Group.of("frozen: no candidate", [n for n in frozen if n in matrices], sizes),
            Group.of("frozen: vectors", [n for n in frozen if n not in matrices], sizes),
        ]
