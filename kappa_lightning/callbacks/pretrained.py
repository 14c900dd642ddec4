"""The pretrained state of a fit: taken before the first step, kept through a checkpoint and a second fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kappa_lightning.anchoring.pretrained import PretrainedState
from kappa_lightning.callbacks.resume import Runs, Start
from kappa_lightning.callbacks.trainer import has_trained
from kappa_lightning.processes import Processes
from kappa_lightning.strategies import adapter_for

_TRAINED = (
    "{source} has no pretrained weights of {owner}, and those that are in the module have trained already: leave the "
    "callback out, or load the weights into a new module and call fit without ckpt_path to start from them"
)


class PretrainedKeeper:
    """Takes and keeps a :class:`~kappa_lightning.anchoring.pretrained.PretrainedState` for a callback.

    Args:
        owner: the callback's name, for messages.
        directory: where the copies are kept, one file for each process; in memory, and in every checkpoint, if
            ``None``.

    Attributes:
        runs: how the fits begin; the owner hands over what Lightning's hooks tell it. Its state is the owner's, with
            that of the keeper as ``"pretrained"``.
        state: the pretrained state, once it is taken.
    """

    def __init__(self, owner: str, directory: str | os.PathLike[str] | None) -> None:
        self.owner = owner
        self.directory = None if directory is None else Path(directory)
        self.state: PretrainedState | None = None
        self.runs = Runs()

    def take(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: torch.device | str | None
    ) -> dict[str, Any] | None:
        """Have the state of what trains before the first step, in ``on_train_start``.

        Args:
            trainer: has restored a checkpoint by now, if it resumes.
            module: what trains.
            device: where the copies lie; ``None`` is beside the parameters.

        Returns:
            The owner's state in the checkpoint that the fit resumes from; ``None`` if it does not resume.

        Raises:
            ValueError: if they are trained and nobody has kept what they were.
        """
        adapter_for(trainer).settle(module)
        start, saved = self.runs.start(trainer, module, trainer.ckpt_path), None
        if start is Start.RESUMED:
            saved = self.runs.state
            assert saved is not None
            self.state = self._restored(trainer, module, device, saved["pretrained"])
        elif start is Start.WITHOUT_STATE:
            raise ValueError(_TRAINED.format(source=f"the checkpoint {trainer.ckpt_path}", owner=self.owner))
        elif start is not Start.FRESH and self.state is not None:
            # What was frozen in the first fit and trains in this one is still as it was.
            self.state.add(module)
        elif start is not Start.FRESH or has_trained(trainer):
            raise ValueError(_TRAINED.format(source="the fit before this one", owner=self.owner))
        else:
            state = PretrainedState(device, self._file(trainer))
            state.add(module)
            self.state = state
        self.runs.begun(module)
        return saved

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint, ``None`` while the owner's state is what was loaded; all processes must ask together."""
        module = self.runs.module
        if self.runs.announced_only or self.state is None or module is None:
            return None
        if self.directory is not None:
            return {"names": list(self.state)}
        return {"tensors": self.state.to_dict(module)}

    def describe(self) -> str:
        """What is kept where, in words."""
        if self.state is None:
            return "nothing is kept"
        where = f"in {self.directory}" if self.directory is not None else f"on {self.state.device or 'its device'}"
        return f"{self.state.num_bytes / 1e6:,.1f} MB of what trains kept as it was, {where}"

    def __getstate__(self) -> dict[str, Any]:
        # What refers to one process' objects stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"state": None}

    def _restored(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        device: torch.device | str | None,
        saved: dict[str, Any],
    ) -> PretrainedState:
        if "tensors" in saved:
            state = PretrainedState(device, self._file(trainer))
            state.load(module, saved["tensors"])
            return state
        file = self._file(trainer)
        if file is None or not file.is_file():
            where = "directory=None" if file is None else f"{file}, which is not there"
            raise ValueError(
                f"the run that is resumed kept its pretrained weights in a folder, and {self.owner} has {where}: give "
                "the folder of that run, and as many processes"
            )
        state = PretrainedState.from_file(file, module)
        missing = [name for name in saved["names"] if name not in state]
        if missing:
            raise ValueError(f"{file} lacks the pretrained {missing[0]}: it is another run's")
        return state

    def _file(self, trainer: pl.Trainer) -> Path | None:
        if self.directory is None:
            return None
        processes: Processes = adapter_for(trainer).processes(trainer)
        part = "" if processes.world_size == 1 else f"-{processes.rank}-of-{processes.world_size}"
        return self.directory / f"pretrained{part}.safetensors"
