"""LoRA as a callback: adapters are put into any LightningModule when fit starts, before its optimizers are made."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

from kappa_lightning.arguments import as_count
from kappa_lightning.callbacks.averaging import AVERAGING
from kappa_lightning.lora import lora_targets
from kappa_lightning.profile import KappaProfile
from kappa_lightning.weights import find_weights, plain_parameters
from kappa_lightning.weights.patterns import included, match_parameters

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraAdapters(Callback):
    """Put LoRA adapters on a module's linear and convolutional layers, and train these alone (Hu et al. 2022).

    The adapters are the identity at the start. They come in before the module makes its optimizers, so that
    ``configure_optimizers`` finds them among the module's parameters; the base weights are frozen.

    Args:
        rank: of the adapters.
        alpha: an adapter's output is multiplied by alpha/rank; twice the rank if ``None``.
        include: globs over the names of parameters; layers whose weight matches get an adapter.
        exclude: but not these.
        max_params: of those, the ones of lowest κ that make up this share (a float) or number (an int) of parameters;
            all if ``None``.
        criterion: what ranks them in place of κ; see :class:`~kappa_lightning.KappaFreezeCallback`.
        always_train: globs of parameters that train beside the adapters (new heads, projectors).
        seed: of the criterion ``"random"``.

    Attributes:
        adapted: the names of the weights that got an adapter, after fit start.

    Raises:
        ValueError: if an argument is out of range; when fit starts, if a pattern matches no parameter, or no layer
            that can be adapted is left. The module is as it was then.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        max_params: int | float | None = None,
        criterion: str = "kappa",
        always_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        rank = as_count(rank, "rank")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha={alpha!r} must be above 0")
        self.rank = rank
        self.alpha = 2.0 * rank if alpha is None else float(alpha)
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.max_params = max_params
        self.criterion = criterion
        self.always_train = tuple(always_train)
        self.seed = seed
        self.adapted: list[str] = []
        self._module: weakref.ref[nn.Module] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or (self._module is not None and self._module() is pl_module):
            return
        from peft import LoraConfig, inject_adapter_in_model

        parameters = plain_parameters(pl_module)
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        always = match_parameters(pl_module, self.always_train, argument="always_train") & trained
        layers = [
            weight
            for weight in included(find_weights(pl_module), pl_module, self.include, self.exclude)
            if weight.name not in always and weight.name in trained and _is_layer(pl_module, weight.name)
        ]
        if not layers:
            raise ValueError(
                f"no linear or convolutional layer that trains is left by include={list(self.include)}, "
                f"exclude={list(self.exclude)} and always_train={list(self.always_train)}: there is nothing to adapt"
            )
        if self.max_params is None:
            names = [weight.name for weight in layers]
            targets: dict[str, Any] = {"target_modules": _exactly(names)}
        else:
            device = next(iter(parameters.values())).device
            profile = KappaProfile.from_weights(layers, device=device)
            budget: dict[str, Any] = {"max_params": self.max_params, "criterion": self.criterion, "seed": self.seed}
            names = profile.select(**budget)
            targets = lora_targets(profile, model=pl_module, **budget)
            targets["target_modules"] = _exactly(names)
        inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=self.alpha, **targets), pl_module)  # type: ignore[arg-type]
        for name, parameter in plain_parameters(pl_module).items():
            # What got an adapter lies one layer deeper now; what is to train as it is does not.
            if name in always:
                parameter.requires_grad_(True)
        self.adapted = names
        self._module = weakref.ref(pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, AVERAGING):
                # It has copied the module without adapters.
                other.setup(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_module": None}


def _exactly(names: Sequence[str]) -> str:
    """A regular expression of the layers of some weights, since PEFT takes a bare name for the end of others, too."""
    return "|".join(re.escape(name.removesuffix(".weight")) for name in names)


def _is_layer(module: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute == "weight" and isinstance(module.get_submodule(owner), _LAYERS)
