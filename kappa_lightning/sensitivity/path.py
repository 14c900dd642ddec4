"""Signal along the way: what each tensor contributes to the fall of the loss while all of them train for some steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kappa_lightning.sensitivity.gradients import clear, entries, require_finite
from kappa_lightning.sensitivity.lending import lent
from kappa_lightning.sensitivity.signal import backward
from kappa_lightning.weights import Weight
from kappa_lightning.weights.sharded import whole


def signals_along(
    weights: Sequence[Weight],
    step: Callable[[int], Tensor],
    optimizers: Sequence[Optimizer],
    *,
    steps: int,
    alongside: Sequence[nn.Parameter] = (),
    scale: float = 1.0,
    settle: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[int, Tensor]]:
    """The signal b of each candidate along the first steps of training.

    All candidates train for some steps t, from w_0 to w_steps. With g_t the gradient before step t,

        b = −Σ_t Σ_i g_ti · (w_(t+1)i − w_ti),

    the path integral of the gradient along the tensor's movement. Over all tensors these add up to the fall of the
    loss, to first order in a step (loss change allocation: Lan et al., arXiv 1909.01440). The first gradient of a model
    that is confidently wrong points to where it becomes less confident, and only later ones to what is to be learned;
    the path sees both, and that gradients that turn or are noise achieve little.

    What trains whatever is chosen, such as a new head, trains along: without it the gradients of all that lies before
    it would be those of its random weights.

    Call it within :func:`~kappa_lightning.sensitivity.gradients.differentiating`. Weights and optimizers are put back
    bit for bit, also if it fails. It takes two copies of the candidates, one of what trains alongside, and what the
    optimizers keep of both.

    Args:
        weights: the candidates.
        step: ``step(number)`` returns the loss of a batch of the new task, with a graph.
        optimizers: those that will train; they lend their steps, at the rate that schedules begin from.
        steps: how many.
        alongside: parameters that train as well, without a figure.
        scale: what a loss is multiplied with before its backward pass, and its gradient divided by.
        settle: called when forward passes are over, before a weight is changed from outside.

    Returns:
        b by name, in units of the loss, 0 for a tensor that moved against its gradients; and by how much each parameter
        moved, by its id.

    Raises:
        ValueError: if a loss is no finite scalar (at a later step, the rate is too high), or an optimizer is LBFGS.

    Example:
        Gradient descent on x·w by 0.5 moves w by −0.5·x, which lowers the loss by 0.5·|x|² in each of two steps.

        >>> from kappa_lightning.weights import find_weights
        >>> module = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 2))})
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        >>> signals_along(find_weights(module), lambda number: (x * module["w"]).sum(), [optimizer], steps=2)[0]
        {'w': 5.0}
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "method='path' takes steps of the optimizer, and LBFGS evaluates the loss several times in one: use "
                "method='gradient'"
            )
    parameters: list[nn.Parameter] = list({id(p): p for weight in weights for p in weight.parameters}.values())
    totals = {weight.name: 0.0 for weight in weights}
    with lent(optimizers, [*parameters, *alongside]) as starts:
        for number in range(steps):
            clear(weights, alongside)
            try:
                backward(step(number), scale)
            except ValueError as error:
                if number == 0:
                    raise
                raise ValueError(
                    f"in step {number + 1} of training to measure signals, {error}: train with a lower rate"
                ) from error
            if scale != 1:
                for parameter in (*parameters, *alongside):
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
            # No second copy: the products before and after a step differ by that with the movement.
            for weight in weights:
                totals[weight.name] += _product(weight)
            for optimizer in optimizers:
                optimizer.step()
            for weight in weights:
                totals[weight.name] -= _product(weight)
        clear(weights, alongside)
        settle()
        moved = {id(p): p.detach() - starts[id(p)] for p in parameters}
    require_finite(totals, "signal")
    return {name: max(0.0, total) for name, total in totals.items()}, moved


def _product(weight: Weight) -> float:
    """Σ g_i·w_i in float64, in which the difference of two such sums keeps its digits."""
    index = () if weight.part is None else weight.part.index
    values = [whole(p.detach()) for p in weight.parameters if p.grad is not None]
    pairs = zip(entries(weight), values, strict=True)
    return sum(float(_wide(g).mul_(_wide(v[index] if index else v)).sum()) for g, v in pairs)


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float64, which MPS has not."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64, copy=True)
