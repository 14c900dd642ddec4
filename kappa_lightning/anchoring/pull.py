"""A pull of the weights themselves towards where they were, apart from the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kappa_lightning.anchoring.pretrained import PretrainedState, local


def pull_back(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], state: PretrainedState, rate: float
) -> None:
    """θ ← θ − lr·rate·(θ − θ₀) for every parameter of an optimizer, right before it steps.

    This is AdamW's decay with θ₀ in the place of zero (Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
    arXiv 1711.05101, algorithm 2; the pull is that of L2-SP, Li et al., arXiv 1802.01483): as a part of the gradient,
    Adam would divide it by the gradient's own size.

    As AdamW does, it leaves a parameter alone that has no gradient in this step.

    Args:
        optimizer: whose groups have the learning rates.
        parameters: by name.
        state: has θ₀.
        rate: in units of one over the learning rate; 0.01 at a learning rate of 1e-4 takes a millionth of the way
            back at each step.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> state = PretrainedState()
        >>> _ = state.add(layer)
        >>> before = layer.weight.item()
        >>> _ = nn.init.constant_(layer.weight, before + 1)
        >>> layer.weight.grad = torch.zeros(1, 1)
        >>> pull_back(torch.optim.SGD(layer.parameters(), lr=0.5), {"weight": layer.weight}, state, rate=0.2)
        >>> round(layer.weight.item() - before, 4)
        0.9
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None or name not in state or parameter.grad is None:
                    continue
                here = local(parameter)
                start: Tensor = state[name].to(here.device, non_blocking=True)
                here.lerp_(start, float(group["lr"]) * rate)
