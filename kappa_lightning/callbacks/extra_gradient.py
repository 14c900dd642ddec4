"""Add the gradient of one more loss to what an optimizer is about to step with."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kappa_lightning.strategies import adapter_for


def add_gradient(
    trainer: pl.Trainer,
    module: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[], Tensor],
) -> None:
    """Run a loss backwards, for an optimizer's own parameters only; called in ``on_before_optimizer_step``.

    At that moment the task's gradients are accumulated, reduced over the processes and, with a GradScaler, unscaled,
    and not clipped yet. So what is added is averaged over the processes here where the strategy's backward pass does
    not do so, is scaled for its own backward pass and unscaled again, and an overflow in it makes the scaler skip the
    step as one in the task's would.

    Args:
        trainer: the fit that is running.
        module: has the parameters.
        optimizer: the one that is about to step.
        loss: computes it, the mean over all processes being what counts.
    """
    adapter = adapter_for(trainer)
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None and adapter.averages_in_backward and len(trainer.optimizers) == 1:
        # Straight into the gradients that are there, without a copy of them.
        loss().backward()  # type: ignore[no-untyped-call]
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        value = loss()
        (value if scaler is None else scaler.scale(value)).backward()  # type: ignore[no-untyped-call]
        adapter.average_gradients(trainer, parameters)
        added = [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs = [(p, new) for p, new in zip(parameters, added, strict=True) if new is not None and id(p) in own]
    if scaler is not None and not _unscales_itself(optimizer):
        _unscale(scaler, optimizer, [new for _, new in pairs])
    with torch.no_grad():
        for parameter, new in pairs:
            if parameter.grad is None:
                parameter.grad = new
            else:
                parameter.grad += new


def will_step(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Whether an optimizer is going to move: not if nothing gave it a gradient, or its scaler will skip this step."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return False
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return True
    if _unscales_itself(optimizer):
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    return not any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())


def _unscales_itself(optimizer: Optimizer) -> bool:
    """As fused optimizers do, whose gradients are scaled until they step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer, gradients: list[Tensor]) -> None:
    if not gradients or not scaler.is_enabled():
        return
    torch._foreach_mul_(gradients, 1 / scaler.get_scale())
    overflow = torch.stack([~torch.isfinite(gradient).all() for gradient in gradients]).any()
    # The scaler looked at the task's gradients before this; it has no public way to be told of more.
    for found in scaler._found_inf_per_device(optimizer).values():
        found.copy_(torch.maximum(found, overflow.to(found)))
