"""Parameters that leave their optimizers, and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

# The names are there if the optimizer was given named parameters.
_ALIGNED = frozenset({"params", "param_names"})


def drop_from_optimizers(optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Take parameters out of the groups of optimizers, and their state with them.

    A group that ends up empty stays, since learning-rate schedulers and a checkpoint count groups.

    Args:
        optimizers: all that may have some of them.
        parameters: what leaves; one that no optimizer has is ignored.

    Returns:
        A function that puts them back.

    Raises:
        ValueError: if an optimizer keeps its parameters elsewhere, too; none has been changed then.
    """
    for optimizer in optimizers:
        # By name, since not every build of PyTorch has the class.
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise ValueError(
                "ZeroRedundancyOptimizer has dealt its parameters to the processes already, and none can leave it: use "
                "a plain optimizer, or ModelParallelStrategy, which shards its state"
            )
    dropped = {id(parameter) for parameter in parameters}
    before = [(optimizer, _Groups(optimizer)) for optimizer in optimizers]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [index for index, p in enumerate(group["params"]) if id(p) not in dropped]
            for key in _ALIGNED.intersection(group):
                group[key] = [group[key][index] for index in kept]
        for parameter in [p for p in optimizer.state if id(p) in dropped]:
            del optimizer.state[parameter]

    def undo() -> None:
        for optimizer, groups in before:
            groups.restore(optimizer)

    return undo


class _Groups:
    """The parameters of an optimizer's groups and their state, as they were."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.aligned = [
            {key: list(group[key]) for key in _ALIGNED.intersection(group)} for group in optimizer.param_groups
        ]
        self.state = dict(optimizer.state)

    def restore(self, optimizer: Optimizer) -> None:
        kept = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # Groups that another callback added since keep what they have.
        added = {id(p) for group in optimizer.param_groups[len(self.aligned) :] for p in group["params"]}
        for group, aligned in zip(optimizer.param_groups, self.aligned, strict=False):
            back = [index for index, p in enumerate(aligned["params"]) if id(p) not in added]
            group.update({key: [values[index] for index in back] for key, values in aligned.items()})
        optimizer.state.update({p: state for p, state in self.state.items() if id(p) not in kept})
