"""A learning rate for each tensor, as a factor of the one that its group has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import LBFGS, Optimizer

_ALIGNED = frozenset({"params", "param_names"})


def scale_rates(optimizers: Sequence[Optimizer], factors: Mapping[nn.Parameter, float]) -> Callable[[], None]:
    """Let tensors train with a multiple of their group's learning rate.

    The groups stay as they are, in number, order and ``lr``, so that schedulers, a rate that is set by hand,
    ``LearningRateMonitor`` and a checkpoint know nothing of it. Only while the optimizer moves its parameters does it
    see each group taken apart by factor, each piece with the group's ``lr`` of that moment times the factor.

    Args:
        optimizers: the optimizers, each derived from :class:`torch.optim.Optimizer`.
        factors: for each tensor its factor, at least 0; 1 for every other one.

    Returns:
        A function that takes it back.

    Raises:
        ValueError: if a factor is negative or not finite, or an optimizer has no rate for each tensor.

    Example:
        >>> import torch
        >>> a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> sgd = torch.optim.SGD([a, b], lr=0.5)
        >>> undo = scale_rates([sgd], {b: 0.1})
        >>> (a + b).backward()
        >>> sgd.step()
        >>> round(a.item(), 3), round(b.item(), 3), [group["lr"] for group in sgd.param_groups]
        (0.5, 0.95, [0.5])
    """
    for factor in factors.values():
        if not 0 <= factor < float("inf"):
            raise ValueError(
                f"a learning rate cannot be scaled by {factor}: give factors that are finite and at least 0"
            )
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError("LBFGS takes one step for all tensors together: use another optimizer with rates")
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no lr in its groups that could be scaled")
    by_id = {id(parameter): float(factor) for parameter, factor in factors.items()}
    stepping = _Stepping(by_id)
    handles = [
        handle
        for optimizer in optimizers
        for handle in (
            optimizer.register_step_pre_hook(stepping.before),
            optimizer.register_step_post_hook(stepping.after),
        )
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        stepping.put_all_back()

    return undo


class _Stepping:
    """Swaps an optimizer's groups for their pieces while it steps."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors = factors
        self.whole: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()
        self.pieces: WeakKeyDictionary[Optimizer, list[list[dict[str, Any]]]] = WeakKeyDictionary()

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.put_back(optimizer)  # after a step that raised
        position = 1  # behind the optimizer itself
        closure = kwargs.get("closure", args[position] if len(args) > position else None)
        if closure is None:
            self.take_apart(optimizer)
            return None
        # What the closure runs, the training step among it, sees the groups as they are and may set their rates.
        wrapped = partial(self.call, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (*args[:position], wrapped, *args[position + 1 :]), kwargs

    def call(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        self.put_back(optimizer)
        loss = closure()
        self.take_apart(optimizer)
        return loss

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.put_back(optimizer)

    def take_apart(self, optimizer: Optimizer) -> None:
        self.whole[optimizer] = optimizer.param_groups
        self.pieces[optimizer] = [self.split(group) for group in optimizer.param_groups]
        optimizer.param_groups = [piece for pieces in self.pieces[optimizer] for piece in pieces]

    def split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by_factor: dict[float, list[int]] = {}
        for index, parameter in enumerate(group["params"]):
            by_factor.setdefault(self.factors.get(id(parameter), 1.0), []).append(index)
        return [
            {
                **group,
                **{key: [group[key][index] for index in indices] for key in _ALIGNED.intersection(group)},
                "lr": group["lr"] * factor if factor != 1 else group["lr"],
            }
            for factor, indices in by_factor.items()
        ]

    def put_back(self, optimizer: Optimizer) -> None:
        whole, pieces = self.whole.pop(optimizer, None), self.pieces.pop(optimizer, None)
        if whole is None or pieces is None:
            return
        for group, parts in zip(whole, pieces, strict=True):
            if parts:
                # Some optimizers count in their groups.
                group.update({key: value for key, value in parts[0].items() if key not in _ALIGNED | {"lr"}})
        optimizer.param_groups = whole

    def put_all_back(self) -> None:
        for optimizer in list(self.whole):
            self.put_back(optimizer)
