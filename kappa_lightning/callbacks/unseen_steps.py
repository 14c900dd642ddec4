"""Optimizers that step without Lightning's hooks, so that no callback can act on their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer


class UnseenSteps:
    """Says it once if an optimizer changes weights before any of its steps came with Lightning's hooks.

    Args:
        who: the callback's name, for the warning.
        optimizers: the Trainer's, whose parameters are as they are now.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(linear.parameters())
        >>> watch = UnseenSteps("PretrainedAnchor", [optimizer])
        >>> watch.saw(0)
        >>> watch.check()  # nothing is left to watch
    """

    def __init__(self, who: str, optimizers: Sequence[Optimizer] = ()) -> None:
        self.who = who
        self._optimizers = list(optimizers)
        # torch counts the changes in place of every tensor, which costs nothing to ask.
        self._versions = {number: _versions(optimizer) for number, optimizer in enumerate(optimizers)}

    def saw(self, number: int) -> None:
        """An optimizer's step came with the hooks; what it trains may change from now on."""
        trained = self._versions.pop(number, {})
        for others in self._versions.values():
            for parameter in trained:
                others.pop(parameter, None)

    def check(self) -> None:
        """After a batch: warn if an optimizer has stepped in silence."""
        for number, versions in self._versions.items():
            now = _versions(self._optimizers[number])
            if any(now.get(parameter, version) != version for parameter, version in versions.items()):
                kind = type(self._optimizers[number]).__name__
                rank_zero_warn(
                    f"{self.who} saw no step of {kind} (optimizer {number}), but its weights have changed: nothing is "
                    "added to its gradients. With manual optimization step with what self.optimizers() returns, not "
                    "with self.optimizers(use_pl_optimizer=False), which leaves Lightning's hooks out"
                )
                self._versions.clear()
                return


def _versions(optimizer: Optimizer) -> dict[int, int]:
    return {id(parameter): parameter._version for group in optimizer.param_groups for parameter in group["params"]}
