"""Freeze a module by condition number before its optimizer is made: for Lightning Fabric and for loops of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kappa_lightning.callbacks import KappaFreezeCallback
from kappa_lightning.callbacks.planner import Patterns, find_candidates
from kappa_lightning.parts import PartialTraining, train_parts
from kappa_lightning.processes import Processes
from kappa_lightning.profile import KappaProfile
from kappa_lightning.profile.progress import progress_bar
from kappa_lightning.weights import plain_parameters


class Frozen:
    """What :func:`freeze` did; made by it.

    Attributes:
        profile: of the candidates.
        trained_names: the names of what trains, in the model's order.
        frozen_names: the names of all other parameters.
        selected_names: the candidates that were selected, the first to train first.
    """

    def __init__(self, module: nn.Module, profile: KappaProfile, selected: list[str], trained: set[str]) -> None:
        self.profile = profile
        self.selected_names = selected
        self.trained_names = [name for name in plain_parameters(module) if name in trained]
        self.frozen_names = [name for name in plain_parameters(module) if name not in trained]
        self._taken: list[nn.Parameter] = []
        self._partial: PartialTraining | None = None

    def unfreeze(self) -> None:
        """Give every parameter that was frozen here its ``requires_grad`` back, and make divided tensors whole."""
        if self._partial is not None:
            self._partial.undo()
            self._partial = None
        for parameter in self._taken:
            parameter.requires_grad_(True)
        self._taken.clear()


def freeze(
    module: nn.Module, *, device: torch.device | str | None = None, progress: bool = True, **arguments: Any
) -> Frozen:
    """Train only the tensors of low condition number, and freeze all others.

    Call it before the optimizer is made and before the module is wrapped (``fabric.setup``,
    ``DistributedDataParallel``), and give the optimizer the parameters that require a gradient. In several processes of
    one group all call it: they share the work and choose the same.

    Args:
        module: any module; only ``requires_grad`` of its parameters changes, or, if single experts or heads train, it
            gets a parameter for each.
        device: where to decompose; by default where the weights are.
        progress: whether to show a progress bar.
        arguments: those of :class:`~kappa_lightning.KappaFreezeCallback`: a budget, ``criterion``, ``include``,
            ``exclude``, ``always_train``, ``experts`` and so on.

    Raises:
        TypeError: as in :class:`~kappa_lightning.KappaFreezeCallback`.
        ValueError: as in :class:`~kappa_lightning.KappaFreezeCallback`. Nothing has been changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> frozen = freeze(net, num_tensors=1, progress=False)
        >>> len(frozen.trained_names), sum(parameter.requires_grad for parameter in net.parameters())
        (1, 1)
        >>> optimizer = torch.optim.AdamW(parameter for parameter in net.parameters() if parameter.requires_grad)
        >>> frozen.unfreeze()
        >>> all(parameter.requires_grad for parameter in net.parameters())
        True
    """
    wanted = KappaFreezeCallback(**arguments)
    patterns = Patterns(wanted.include, wanted.exclude, wanted.always_train, wanted.train_vectors)
    candidates = find_candidates(module, patterns, optimized=set(plain_parameters(module)))
    processes = Processes.of_this_run()
    watch = progress_bar if progress and processes.is_global_zero else None
    choice = wanted.choose_among(module, candidates.weights, device=device, watch=watch, processes=processes)
    plan = candidates.plan(choice)
    plan.require_same(processes)

    parameters = plain_parameters(module)
    taken = [parameters[name] for name in parameters if name in plan.frozen and parameters[name].requires_grad]
    partial = train_parts(module, plan.parts) if plan.parts else None
    for parameter in taken:
        parameter.requires_grad = False
        parameter.grad = None
    frozen = Frozen(module, choice.profile, choice.selected, plan.trained)
    frozen._taken, frozen._partial = taken, partial
    return frozen
