"""Signal: how much moving a tensor lowers the loss of the new task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kappa_lightning.processes import Processes
from kappa_lightning.sensitivity.gradients import (
    add_up,
    clear,
    entries,
    require_finite,
    sum_of_magnitudes,
    sum_of_squares,
)
from kappa_lightning.weights import Weight

Step = Callable[[], Tensor]

OPTIMIZERS: dict[str, str] = {
    "adam": "moves every entry alike, by its learning rate: b = Σ|ḡ_i|",
    "sgd": "moves every entry in proportion to its gradient: b = Σḡ_i²",
}
"""The kinds of optimizers whose steps are known, and what a step does."""


def kind_of_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Which of :data:`OPTIMIZERS` an optimizer is; ``None`` if it is neither.

    Those that divide by a running scale of the gradient, or take its sign, are ``"adam"``; plain gradient descent,
    with momentum or not, is ``"sgd"``.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> kind_of_optimizer(torch.optim.AdamW([weight])), kind_of_optimizer(torch.optim.SGD([weight]))
        ('adam', 'sgd')
    """
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    scaled = ("adam", "rmsprop", "adagrad", "adadelta", "lion", "lamb", "adafactor", "rprop", "sign")
    for name in names:
        if any(part in name for part in scaled):
            return "adam"
        if name.startswith(("sgd", "asgd")):
            return "sgd"
    return None


def signals(
    weights: Sequence[Weight],
    losses: Iterable[Step],
    optimizer: str = "adam",
    *,
    processes: Processes | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """The signal b of each candidate, from the mean gradient ḡ of the new task's loss over some batches.

    A step of length η along the optimizer's direction u lowers the loss by η Σ_i ḡ_i u_i to first order. Adam's u_i is
    the sign of ḡ_i, so b = Σ|ḡ_i|; gradient descent's is ḡ_i, so b = Σḡ_i². What Adam's second moment adds is
    neglected (see the page on sensitivity).

    Call it within :func:`~kappa_lightning.sensitivity.gradients.differentiating`.

    Args:
        weights: the candidates.
        losses: a function for each batch (of this process) that returns its loss, a scalar.
        optimizer: a key of :data:`OPTIMIZERS`.
        processes: who has a share of the batches; only this one if ``None``.
        scale: what a loss is multiplied with before its backward pass; b is that of the loss without.

    Returns:
        b by name, in units of the loss per unit of weight (Adam) or per its square (SGD); 0 for what has no gradient.

    Raises:
        ValueError: if the optimizer is unknown, there is no batch, a loss is no finite scalar or has no gradient.

    Example:
        The mean gradient of x·w over x = (1, −3) and x = (1, 1) is (1, −1).

        >>> from kappa_lightning.weights import find_weights
        >>> weight = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.ones(2, 2))})
        >>> inputs = torch.tensor([[1.0, -3.0], [1.0, 1.0]])
        >>> losses = [lambda x=x: (weight["w"] @ x).sum() for x in inputs]
        >>> signals(find_weights(weight), losses), signals(find_weights(weight), losses, "sgd")
        ({'w': 4.0}, {'w': 4.0})
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown: use one of {', '.join(map(repr, OPTIMIZERS))}")
    together = processes or Processes()
    clear(weights)
    count = 0
    with together.failing_together():
        for loss in losses:
            backward(loss(), scale)
            count += 1
    total = sum(together.gather(count))
    if total == 0:
        raise ValueError("the train dataloader gave no batch: there is no task to measure a signal of")
    add_up(weights, together)
    if optimizer == "adam":
        found = {weight.name: sum_of_magnitudes(entries(weight)) / (total * scale) for weight in weights}
    else:
        found = {weight.name: sum_of_squares(entries(weight)) / (total * scale) ** 2 for weight in weights}
    clear(weights)
    require_finite(found, "signal")
    return found


def backward(loss: Tensor, scale: float = 1.0) -> None:
    """A backward pass from a finite scalar, multiplied with a scale.

    Raises:
        ValueError: if it is none, or no parameter takes part in it.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss is {found}, not a scalar")
    if not bool(loss.detach().isfinite()):
        raise ValueError(f"the loss is {loss.item()}, so it has no gradient to choose by")
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient: no parameter that requires one takes part in it")
    (loss * scale).backward()  # type: ignore[no-untyped-call]
