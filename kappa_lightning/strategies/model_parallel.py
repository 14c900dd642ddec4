"""FSDP2 and tensor parallelism: each process holds a part of the parameters, as ``DTensor``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from kappa_lightning.evaluation import Share
from kappa_lightning.processes import Processes
from kappa_lightning.strategies.adapter import StrategyAdapter
from kappa_lightning.strategies.buffers import those_of_the_first
from kappa_lightning.weights.sharded import reshard


class ModelParallelAdapter(StrategyAdapter):
    """:class:`~lightning.pytorch.strategies.ModelParallelStrategy`: data parallel (FSDP2), tensor parallel or both.

    Freezing works after sharding, since FSDP2 copies ``requires_grad`` from the shard whenever it gathers a parameter.
    """

    @override
    def processes(self, trainer: pl.Trainer) -> Processes:
        return Processes.of_this_run()

    @override
    def evaluating(self, module: pl.LightningModule) -> AbstractContextManager[None]:
        return those_of_the_first(module)

    @override
    def share(self, trainer: pl.Trainer) -> Share:
        strategy = trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy)
        mesh = strategy.device_mesh["data_parallel"]
        return Share(mesh.get_local_rank(), mesh.size(), lockstep=True, group=mesh.get_group())

    @override
    def checkpoint_path(self, trainer: pl.Trainer, callback: Callback) -> str | os.PathLike[str] | None:
        """The checkpoint to come: this strategy restores it after ``on_fit_start``, the optimizers' state with it.

        By then their groups must be as they were saved, so the callback gets its state from the file beforehand.
        """
        path = _checkpoint_to_come(trainer)
        if path is not None:
            path = trainer.strategy.broadcast(path)
            checkpoint = _read(Path(path))
            callback.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state is not None:
                callback.load_state_dict(state)
        return path

    @override
    def numbering(self, trainer: pl.Trainer) -> str:
        strategy = trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy)
        return "name" if strategy._save_distributed_checkpoint else "module"

    @override
    def require_numbering(self, trainer: pl.Trainer, saved: str, kept: Collection[str]) -> None:
        if saved == "optimizer":
            raise ValueError(
                "the checkpoint was saved by another strategy, whose optimizer states are numbered by the optimizer's "
                "own parameters; after a freeze Lightning would give them to the wrong ones under "
                f"{type(trainer.strategy).__name__}: resume with that strategy, or load the weights into the module "
                "and call fit without ckpt_path"
            )

    @override
    def settle(self, module: pl.LightningModule) -> None:
        reshard(module)


def _checkpoint_to_come(trainer: pl.Trainer) -> str | os.PathLike[str] | None:
    """The argument ``ckpt_path`` of the ``Trainer._run`` that is calling.

    ``trainer.ckpt_path`` is set when the restoring begins, which is after ``on_fit_start``, and until then Lightning
    keeps the path nowhere but in that argument.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        known = frame.f_locals
        if frame.f_code.co_name == "_run" and known.get("self") is trainer and "ckpt_path" in known:
            path: str | os.PathLike[str] | None = known["ckpt_path"]
            return path
        frame = frame.f_back
    raise RuntimeError(
        "the freeze cannot tell whether this fit resumes: it was not called from Trainer._run(ckpt_path=…) of "
        "Lightning 2.6"
    )


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint without its weights, whether one file or a folder of shards."""
    # Mapped into memory, so that of a large file only the pages that are looked at are read.
    file, mapped = (path / _METADATA_FILENAME, False) if path.is_dir() else (path, True)
    # weights_only as Lightning will load it in a moment, which is True unless the user's environment says otherwise.
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", mmap=mapped, weights_only=None)
    return checkpoint
