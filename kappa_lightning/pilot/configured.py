"""A LightningCLI configuration as what a pilot needs: the module, its data, the probes and the Trainer's arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from kappa_lightning.callbacks import ForgettingEval
from kappa_lightning.pilot.trial import OWN, SEEDS, quiet
from kappa_lightning.probes import Probe
from kappa_lightning.restoring import environment_restored, random_numbers_restored

SECTION = "pilot"
"""The part of a configuration that LightningCLI does not know: keyword arguments of ``pilot``."""


class Configured:
    """What a configuration says, built when it is first needed, in each process anew.

    It is one that ``LightningCLI(subclass_mode_model=True, subclass_mode_data=True)`` takes: ``model`` and ``data``
    have a ``class_path``. The probes are those of the ``ForgettingEval`` among ``trainer.callbacks``; other callbacks
    and loggers are left out, and so is what a pilot sets itself, such as ``max_epochs``.

    Args:
        path: the YAML file.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: if jsonargparse is not installed.
        ValueError: if it is no configuration with a model, data and a ``ForgettingEval``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import yaml

        self.path = Path(path)
        try:
            config = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} is no configuration: it must have the entries model, data and trainer")
        for section in ("model", "data"):
            if not isinstance(config.get(section), dict) or "class_path" not in config[section]:
                raise ValueError(f"{path}: {section} needs a class_path, and its init_args")
        self.options: dict[str, Any] = config.pop(SECTION, None) or {}
        self.config: dict[str, Any] = config
        self._built: Any = None

    def make_module(self) -> pl.LightningModule:
        """The module; the same one each time, since a pilot trains a copy."""
        module: pl.LightningModule = self._cli().model
        return module

    def make_data(self) -> pl.LightningDataModule:
        """The data module."""
        data: pl.LightningDataModule = self._cli().datamodule
        return data

    def probes(self, module: pl.LightningModule) -> Mapping[str, Probe]:
        """Those of the ``ForgettingEval`` in the configuration."""
        for callback in self._cli().trainer.callbacks:
            if isinstance(callback, ForgettingEval):
                return callback.probes
        raise ValueError(f"{self.path}: trainer.callbacks has no ForgettingEval, whose probes say what is to be kept")

    def trainer(self) -> dict[str, Any]:
        """The Trainer's arguments that a run of the pilot shares with the user's own."""
        asked = set(self.config.get("trainer") or {}) - OWN - {"callbacks", "default_root_dir"}
        values = self._cli().config_init["trainer"]
        return {name: values[name] for name in sorted(asked)}

    def settings(self) -> dict[str, Any]:
        """What of the file decides the runs: all but what a run may do beside them, such as logging."""
        callbacks = (self.config.get("trainer") or {}).get("callbacks") or []
        kept = [one for one in callbacks if str(one.get("class_path", "")).endswith("ForgettingEval")]
        return {**{name: part for name, part in self.config.items() if name != "trainer"}, "probes": kept}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None}

    def _cli(self) -> Any:
        if self._built is None:
            from lightning.pytorch.cli import LightningCLI

            # As a script of the user's own would find its modules.
            if (here := os.getcwd()) not in sys.path:
                sys.path.insert(0, here)
            with random_numbers_restored(), environment_restored(*SEEDS), quiet():
                # Or it would be seeded with the run that happens to be the first of a process.
                os.environ.pop("PL_GLOBAL_SEED", None)
                self._built = LightningCLI(
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    save_config_callback=None,
                    run=False,
                    args=self.config,
                )
        return self._built
