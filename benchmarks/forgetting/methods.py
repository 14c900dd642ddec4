"""The methods that are compared: each prepares a model before its fit, and says what runs along with it.

======================  ================================================================================================
full                    everything trains
a criterion             its first matrices within the budget train: ``kappa``, ``reversed:kappa``, ``random``, …, and
                        with `` within shape`` or `` within role`` behind it, its first ones of every group
soft:1/kappa            all matrices train, the steps of each as long as :mod:`benchmarks.forgetting.soft` says
last_layers             the last matrices of the model within the budget train
lora_all                LoRA on every linear and convolutional layer (Hu et al. 2022)
lora_kappa              LoRA on the layers of lowest κ within the budget
osf                     orthogonal subspace fine-tuning of every linear layer, as in PEFT (Nayak et al. 2025)
l2_sp                   full, with a pull of ``strength``·(θ − θ₀) added to the gradient (Li et al. 2018)
wise_ft                 full, and then the straight line from the pretrained to the trained weights in place of a run's
                        path (Wortsman et al. 2022); ``wise:kappa`` and the like: the same after another method
======================  ================================================================================================

All but full, soft, l2_sp and wise_ft train a number of the pretrained parameters as near to the budget as each can. The
criteria are those of the package and those of :mod:`benchmarks.forgetting.candidates`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import benchmarks.forgetting.candidates  # noqa: F401 - registers its criteria
from benchmarks.forgetting.soft import StepLengths, check_length, step_lengths
from benchmarks.forgetting.task import Task
from kappa_lightning import KappaFreezeCallback, KappaProfile
from kappa_lightning.selection import criterion_of
from kappa_lightning.weights import Weight, find_weights, match_names, plain_parameters, tied_names
from kappa_lightning.weights.patterns import included

WITHIN = " within "
SOFT = "soft:"
"""What stands before the name of a step length."""
WISE = "wise:"
"""What stands before a method to walk back from what it trained."""


def walks_back(method: str) -> tuple[bool, str]:
    """Whether a method walks back towards the pretrained weights, and the one by which it trains before.

    Example:
        >>> walks_back("wise_ft"), walks_back("wise:kappa"), walks_back("kappa")
        ((True, 'full'), (True, 'kappa'), (False, 'kappa'))
    """
    if method == "wise_ft":
        return True, "full"
    return method.startswith(WISE), method.removeprefix(WISE)


def check_method(method: str) -> None:
    """Raise a ValueError if there is no such method."""
    method = walks_back(method)[1]
    if method in METHODS:
        return
    if method.startswith(SOFT):
        check_length(method.removeprefix(SOFT))
        return
    try:
        criterion_of(method.split(WITHIN)[0])
    except ValueError as error:
        known = ", ".join(METHODS)
        raise ValueError(f"method {method!r} is none of {known}, and as a criterion: {error}") from error


def prepare(
    method: str, module: pl.LightningModule, task: Task, *, budget: float, strength: float, seed: int
) -> list[pl.Callback]:
    """Freeze, wrap or leave the module's parameters as the method wants it, and return its callbacks.

    Args:
        method: see the module.
        module: the model before its fit; it is changed.
        task: whose model it is.
        budget: the share of the candidates' parameters that trains.
        strength: of the pull of ``l2_sp``; of no effect on the others.
        seed: of the criterion ``random``.

    Raises:
        ValueError: if there is no such method, or nothing fits the budget.
    """
    check_method(method)
    candidates = included(find_weights(module), module, task.pretrained, task.new)
    limit = int(budget * sum(weight.parameter.numel() for weight in candidates if weight.parameter is not None))
    if method in METHODS:
        return METHODS[method](module, task, candidates, limit, strength)
    if method.startswith(SOFT):
        return _soft(module, task, candidates, method.removeprefix(SOFT))
    criterion, _, within = method.partition(WITHIN)
    freeze = KappaFreezeCallback(
        max_params=limit,
        criterion=criterion,
        within=within or "all",
        seed=seed,
        include=task.pretrained,
        exclude=task.new,
        always_train=task.new,
    )
    return [freeze]


def _full(
    module: pl.LightningModule, task: Task, candidates: Sequence[Weight], limit: int, strength: float
) -> list[pl.Callback]:
    return []


def _last_layers(
    module: pl.LightningModule, task: Task, candidates: Sequence[Weight], limit: int, strength: float
) -> list[pl.Callback]:
    chosen, used = set(), 0
    for weight in reversed(candidates):
        size = weight.parameter.numel() if weight.parameter is not None else 0
        if used + size <= limit:
            chosen.add(weight.name)
            used += size
    if not chosen:
        raise ValueError(f"last_layers: no matrix has at most {limit:,} parameters")
    _train_only(module, chosen | _new(module, task))
    return []


def _lora_all(
    module: pl.LightningModule, task: Task, candidates: Sequence[Weight], limit: int, strength: float
) -> list[pl.Callback]:
    _add_lora(module, task, candidates, limit)
    return []


def _lora_kappa(
    module: pl.LightningModule, task: Task, candidates: Sequence[Weight], limit: int, strength: float
) -> list[pl.Callback]:
    layers = [weight for weight in candidates if isinstance(_layer(module, weight), nn.Linear | nn.Conv2d)]
    profile = KappaProfile.from_weights(layers)
    chosen = set(profile.select(max_params=limit))
    _add_lora(module, task, [weight for weight in layers if weight.name in chosen], limit)
    return []


def _osf(
    module: pl.LightningModule, task: Task, candidates: Sequence[Weight], limit: int, strength: float
) -> list[pl.Callback]:
    from peft import OSFConfig, inject_adapter_in_model

    layers = [weight for weight in candidates if isinstance(_layer(module, weight), nn.Linear)]

    def trained(kept: float) -> int:
        """The parameters that train if a share of each layer's singular directions is kept."""
        return sum((min(w.shape) - _kept(w, kept)) * (sum(w.shape) + 1) for w in layers)

    shares = [step / 200 for step in range(1, 200)]
    share = min(shares, key=lambda kept: abs(trained(kept) - limit))
    pattern: dict[str, int | float] = {
        _layer_name(weight).replace(".", r"\."): _kept(weight, share) for weight in layers
    }
    config = OSFConfig(target_modules=[_layer_name(weight) for weight in layers], rank_pattern=pattern)
    new = _new(module, task)
    inject_adapter_in_model(config, module)
    _thaw(module, new)
    return []


def _soft(module: pl.LightningModule, task: Task, candidates: Sequence[Weight], name: str) -> list[pl.Callback]:
    profile = KappaProfile.from_weights(candidates)
    lengths = step_lengths(profile, name)
    _train_only(module, set(lengths) | _new(module, task))
    return [StepLengths(lengths)]


def _l2_sp(
    module: pl.LightningModule, task: Task, candidates: Sequence[Weight], limit: int, strength: float
) -> list[pl.Callback]:
    names = match_names(plain_parameters(module), task.pretrained, argument="pretrained", aliases=tied_names(module))
    return [PullTowardsStart(sorted(names - _new(module, task)), strength)]


Method = Callable[[pl.LightningModule, Task, Sequence[Weight], int, float], list[pl.Callback]]

METHODS: dict[str, Method] = {
    "full": _full,
    "last_layers": _last_layers,
    "lora_all": _lora_all,
    "lora_kappa": _lora_kappa,
    "osf": _osf,
    "l2_sp": _l2_sp,
    "wise_ft": _full,
}
"""The methods that are no criterion."""


class PullTowardsStart(pl.Callback):
    """Add strength·(θ − θ₀) to the gradient of each parameter: the penalty (strength/2)·‖θ − θ₀‖² of L2-SP."""

    def __init__(self, names: Sequence[str], strength: float) -> None:
        self.names = names
        self.strength = strength
        self.start: list[tuple[nn.Parameter, Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the pretrained values."""
        parameters = plain_parameters(pl_module)
        self.start = [(parameters[name], parameters[name].detach().clone()) for name in self.names]

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Pull."""
        for parameter, start in self.start:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.strength)


def _add_lora(module: pl.LightningModule, task: Task, weights: Sequence[Weight], limit: int) -> None:
    """LoRA on the linear and convolutional ones of some weights, of the rank that comes nearest to the limit."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [weight for weight in weights if isinstance(_layer(module, weight), nn.Linear | nn.Conv2d)]
    per_rank = sum(rows + cols for _, rows, cols in (weight.stack_shape for weight in layers))
    rank = max(1, round(limit / per_rank))
    new = _new(module, task)
    names = [_layer_name(weight) for weight in layers]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), module)
    _thaw(module, new)


def _kept(weight: Weight, share: float) -> int:
    return max(1, min(min(weight.shape) - 1, round(share * min(weight.shape))))


def _layer_name(weight: Weight) -> str:
    return weight.name.removesuffix(".weight")


def _layer(module: nn.Module, weight: Weight) -> nn.Module:
    return module.get_submodule(weight.name.rpartition(".")[0])


def _new(module: pl.LightningModule, task: Task) -> set[str]:
    return match_names(plain_parameters(module), task.new, argument="new", aliases=tied_names(module))


def _train_only(module: nn.Module, names: set[str]) -> None:
    for name, parameter in plain_parameters(module).items():
        parameter.requires_grad_(name in names)


def _thaw(module: nn.Module, names: set[str]) -> None:
    """Let parameters train again after PEFT froze all but its own."""
    parameters = plain_parameters(module)
    for name in names:
        parameters[name].requires_grad_(True)
