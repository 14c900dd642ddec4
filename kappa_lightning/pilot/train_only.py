"""Some matrices train and nothing else: a choice by name, without condition numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

from kappa_lightning.weights import find_weights, plain_parameters
from kappa_lightning.weights.patterns import check_patterns, included, match_parameters


class TrainOnly(Callback):
    """Let only the matrices that a pattern matches train; after the fit everything requires a gradient as before.

    It freezes when the fit is set up, before a strategy wraps the module and before the optimizers are made, and so
    works
    under every strategy. Frozen parameters may be in an optimizer; they never have a gradient, so it steps over them.

    Args:
        include: globs over parameter names, and groups such as ``"@gate_up"``, of the matrices that train.
        always_train: globs of what trains beside them, vectors too.
        exclude: globs of matrices that do not train although ``include`` matches them.

    Raises:
        ValueError: when the fit is set up, if a pattern matches no parameter, or nothing is left to train.
    """

    def __init__(
        self, include: Sequence[str] = ("*",), always_train: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.include = check_patterns(include, argument="include")
        self.always_train = check_patterns(always_train, argument="always_train")
        self.exclude = check_patterns(exclude, argument="exclude")
        self._frozen: list[nn.Parameter] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        chosen = {weight.name for weight in included(find_weights(pl_module), pl_module, self.include, self.exclude)}
        chosen |= match_parameters(pl_module, self.always_train, argument="always_train")
        required = {name: p for name, p in plain_parameters(pl_module).items() if p.requires_grad}
        if not chosen & required.keys():
            raise ValueError(
                f"nothing to train: include={list(self.include)}, exclude={list(self.exclude)} and "
                f"always_train={list(self.always_train)} leave no matrix that requires a gradient"
            )
        self._frozen = [parameter for name, parameter in required.items() if name not in chosen]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._thaw()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._thaw()

    def __getstate__(self) -> dict[str, Any]:
        # The parameters are of one process' module.
        return self.__dict__ | {"_frozen": []}

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
