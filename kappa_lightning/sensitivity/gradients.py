"""Gradients of the candidates alone, one at a time, and without a trace on the module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kappa_lightning.processes import Processes
from kappa_lightning.restoring import gradients_restored, random_numbers_restored, state_restored
from kappa_lightning.weights import Weight
from kappa_lightning.weights.sharded import whole


@contextmanager
def differentiating(
    module: nn.Module, weights: Sequence[Weight], alongside: Sequence[nn.Parameter] = ()
) -> Iterator[None]:
    """Backward passes in the block leave the gradients of candidates and what trains alongside, no other, in ``.grad``.

    A gradient of another parameter is freed as soon as it is there. Afterwards gradients, buffers, what else the
    submodules keep, and all random numbers are as before. Inside of inference mode it is left for the block.

    Args:
        module: a model whose parameters are in ``weights``.
        weights: the candidates, each made from parameters that require a gradient.
        alongside: other parameters whose gradients are left.
    """
    kept = {id(parameter) for weight in weights for parameter in weight.parameters} | {id(p) for p in alongside}
    parameters = list(module.parameters())
    others = [p for p in parameters if p.requires_grad and id(p) not in kept]
    with (
        random_numbers_restored(),
        state_restored(module),
        gradients_restored(parameters),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        handles = [parameter.register_post_accumulate_grad_hook(_free) for parameter in others]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def clear(weights: Sequence[Weight], alongside: Sequence[nn.Parameter] = ()) -> None:
    """Forget the gradients of candidates and of what trains alongside."""
    for weight in weights:
        for parameter in weight.parameters:
            parameter.grad = None
    for parameter in alongside:
        parameter.grad = None


def entries(weight: Weight) -> list[Tensor]:
    """The gradient of a candidate, of each parameter that it is made from; nothing of one that has none.

    A sharded gradient is collected, which its processes must do together.
    """
    found = []
    for parameter in weight.parameters:
        if parameter.grad is not None:
            gradient = whole(parameter.grad)
            found.append(gradient if weight.part is None else gradient[weight.part.index])
    return found


def sum_of_magnitudes(gradients: Sequence[Tensor]) -> float:
    """Σ|g_i| over all entries, summed in float64."""
    return sum(float(torch.linalg.vector_norm(g, 1, dtype=_wide(g))) for g in gradients)


def sum_of_squares(gradients: Sequence[Tensor]) -> float:
    """Σg_i² over all entries, summed in float64."""
    return sum(float(torch.linalg.vector_norm(g, 2, dtype=_wide(g))) ** 2 for g in gradients)


def add_up(weights: Sequence[Weight], processes: Processes) -> None:
    """Add the gradients that several processes have of different batches, so that all have the sum."""
    if processes.world_size == 1:
        return
    done: set[int] = set()
    for weight in weights:
        for parameter in weight.parameters:
            if id(parameter) not in done:
                done.add(id(parameter))
                if parameter.grad is None:  # no batch of this process has reached it
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)


def require_finite(values: dict[str, float], what: str) -> None:
    """Make sure that a figure of every candidate is a number.

    Raises:
        ValueError: if one is not; the message names the tensor.
    """
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ValueError(
                f"the {what} of {name} is {value}: its gradient has NaN or infinite entries. Check the loss and the "
                "weights, or train in bfloat16 or float32 instead of float16"
            )


def _wide(tensor: Tensor) -> torch.dtype:
    """float64 keeps a long sum exact; MPS has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
