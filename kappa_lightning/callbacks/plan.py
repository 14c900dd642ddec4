"""What a freeze is going to do, decided before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kappa_lightning.processes import Processes
from kappa_lightning.profile import KappaProfile
from kappa_lightning.tables import Group
from kappa_lightning.weights import find_weights, plain_parameters


@dataclass(frozen=True, slots=True)
class Plan:
    """What will train.

    Attributes:
        trained: the names of all parameters that train.
        selected: the candidates that were selected, the lowest-ranked first.
        profile: of the candidates.
    """

    trained: set[str]
    selected: list[str]
    profile: KappaProfile

    def require_same(self, processes: Processes) -> None:
        """Make sure that all processes train the same tensors; they would wait for each other's gradients for ever.

        Raises:
            RuntimeError: if they do not; the message names a tensor.
        """
        plans = processes.gather(sorted(self.trained))
        for other, trained in enumerate(plans):
            if trained != plans[0]:
                name = min(set(trained) ^ set(plans[0]))
                raise RuntimeError(
                    f"the processes of rank 0 and {other} do not train the same tensors, {name} first: the module must "
                    "be the same on both, with the same requires_grad"
                )

    def groups(self, module: nn.Module, *, criterion: str, train_vectors: bool) -> list[Group]:
        """The module's parameters by what becomes of them, for a table."""
        parameters = plain_parameters(module)
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        made_of = {weight.name: (weight.name, *weight.companions) for weight in find_weights(module)}
        matrices = {name for names in made_of.values() for name in names}
        chosen = set(self.selected)
        selected = {name for candidate in chosen for name in made_of[candidate]}
        passed = {name for row in self.profile if row.name not in chosen for name in made_of[row.name]}
        rest = [name for name in parameters if name in self.trained and name not in selected]
        frozen = [name for name in parameters if name not in self.trained and name not in passed]
        return [
            Group.of(f"trains: selected by {criterion}", selected, sizes, self.profile),
            Group.of("trains: always_train", [n for n in rest if not train_vectors or n in matrices], sizes),
            Group.of("trains: vectors", [n for n in rest if train_vectors and n not in matrices], sizes),
            Group.of(f"frozen by {criterion}", passed, sizes, self.profile),
            Group.of("frozen: no candidate", [n for n in frozen if n in matrices], sizes),
            Group.of("frozen: vectors", [n for n in frozen if n not in matrices], sizes),
        ]
