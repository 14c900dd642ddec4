"""The pretrained state of a fit: taken before the first step, kept through a checkpoint and a second fit."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from kappa_lightning.anchoring.pretrained import PretrainedState
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
    """

    def __init__(self, owner: str, directory: str | os.PathLike[str] | None) -> None:
        self.owner = owner
        self.directory = None if directory is None else Path(directory)
        self.state: PretrainedState | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._restored: dict[str, Any] | None = None
        self._checkpoint_step = 0

    def checkpoint_begins(self, checkpoint: dict[str, Any]) -> None:
        """Called in ``on_load_checkpoint``, which comes before the state, and also if there is none."""
        self._restored = None
        self._checkpoint_step = checkpoint["global_step"]

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Called in ``load_state_dict``; only a fit takes it over."""
        self._restored = saved

    def forget_checkpoint(self) -> None:
        """Called when the fit has ended."""
        self._restored, self._checkpoint_step = None, 0

    def take(self, trainer: pl.Trainer, module: pl.LightningModule, device: torch.device | str | None) -> bool:
        """Have the state of what trains before the first step, in ``on_train_start``.

        Args:
            trainer: has restored a checkpoint by now, if it resumes.
            module: what trains.
            device: where the copies lie; ``None`` is beside the parameters.

        Returns:
            Whether the module's weights are the pretrained ones at this moment.

        Raises:
            ValueError: if they are trained and nobody has kept what they were.
        """
        adapter_for(trainer).settle(module)
        known = self.state is not None and self._module is not None and self._module() is module
        self._module = weakref.ref(module)
        if trainer.ckpt_path is not None and self._restored is not None:
            self._resume(trainer, module, device)
            return False
        if trainer.ckpt_path is not None and self._checkpoint_step > 0:
            raise ValueError(_TRAINED.format(source=f"the checkpoint {trainer.ckpt_path}", owner=self.owner))
        if known:
            assert self.state is not None
            # What was frozen in the first fit and trains in this one is still as it was.
            self.state.add(module)
            return False
        if trainer.global_step > 0:
            raise ValueError(_TRAINED.format(source="the fit before this one", owner=self.owner))
        self.state = PretrainedState(device, self._file(trainer))
        self.state.add(module)
        return True

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint; of sharded tensors all processes must ask together."""
        module = None if self._module is None else self._module()
        if self.state is None or module is None:
            return self._restored
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
        return self.__dict__ | {"_module": None, "state": None}

    def _resume(self, trainer: pl.Trainer, module: pl.LightningModule, device: torch.device | str | None) -> None:
        assert self._restored is not None
        if "tensors" in self._restored:
            self.state = PretrainedState(device, self._file(trainer))
            self.state.load(module, self._restored["tensors"])
            return
        file = self._file(trainer)
        if file is None or not file.is_file():
            where = "directory=None" if file is None else f"{file}, which is not there"
            raise ValueError(
                f"the run that is resumed kept its pretrained weights in a folder, and {self.owner} has {where}: give "
                "the folder of that run, and as many processes"
            )
        self.state = PretrainedState.from_file(file, module)
        missing = [name for name in self._restored["names"] if name not in self.state]
        if missing:
            raise ValueError(f"{file} lacks the pretrained {missing[0]}: it is another run's")

    def _file(self, trainer: pl.Trainer) -> Path | None:
        if self.directory is None:
            return None
        processes: Processes = adapter_for(trainer).processes(trainer)
        part = "" if processes.world_size == 1 else f"-{processes.rank}-of-{processes.world_size}"
        return self.directory / f"pretrained{part}.safetensors"
