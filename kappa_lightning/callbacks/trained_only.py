"""Checkpoints of only what trains, bound to the base that it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from kappa_lightning.callbacks.keyed import Keyed
from kappa_lightning.callbacks.resume import Runs, Start
from kappa_lightning.callbacks.schedule import Schedule
from kappa_lightning.callbacks.trainer import has_trained
from kappa_lightning.files import replacing
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.strategies import adapter_for
from kappa_lightning.weights.sharded import whole

FORMAT = "kappa-lightning trained tensors"


class TrainedOnlyCheckpoint(Keyed):
    """Write only the tensors that train to disk, as safetensors, with the fingerprint of the base that they belong to.

    Where a fifth of a model trains, a file is a fifth as large as the model and has no optimizer states. It holds the
    parameters that require a gradient and the buffers that changed; :func:`load_trained` puts them onto the base again
    and checks that it is that base, :func:`save_full` writes a whole state dict. To resume a run, use
    ``ModelCheckpoint``.

    Args:
        dirpath: the folder; by default ``trained`` in the Trainer's ``default_root_dir``.
        filename: with ``{epoch}`` and ``{step}``.
        every_n_epochs: the number of epochs between files; by default 1, or none with ``every_n_train_steps``.
        every_n_train_steps: the number of optimizer steps between files.
        monitor: a logged figure; then only the best file is kept.
        mode: whether the ``"max"`` or the ``"min"`` is best.

    Attributes:
        last_path: the file that was written last.
        best_score: with ``monitor``, the figure of the file that is kept.

    Raises:
        ValueError: if an argument is out of range, if a monitored figure has not been logged, or if nothing trains.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str = "epoch={epoch}-step={step}",
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        monitor: str | None = None,
        mode: str = "max",
    ) -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise ValueError(f'mode={mode!r} must be "max" or "min"')
        self.schedule = Schedule(every_n_epochs, every_n_train_steps)
        self.dirpath, self.filename, self.monitor, self.mode = dirpath, filename, monitor, mode
        self.last_path: Path | None = None
        self.best_score: float | None = None
        self._base: dict[str, str] = {}
        self._step = 0
        self._runs = Runs()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.refuse_equals(trainer, "which would write the same files", "give it another dirpath or filename")
            self._runs.announced()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called before load_state_dict, and also if the checkpoint has no state of this callback.
        self._runs.opened(checkpoint)
        states = checkpoint.get("callbacks") or {}
        kind = type(self).__qualname__
        others = [state for key, state in states.items() if str(key).partition("{")[0] == kind]
        if self.own_key not in states and others:
            # Of other arguments, which kept files of its own of the same base.
            self._runs.loaded({**others[0], "best_score": None, "last_path": None})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        adapter_for(trainer).settle(pl_module)
        self._step = trainer.global_step
        start = self._runs.start(trainer, pl_module, trainer.ckpt_path)
        if start is Start.RESUMED:
            saved = self._runs.state
            assert saved is not None
            self._base = dict(saved["base"])
            self.best_score = saved["best_score"]
            self.last_path = None if saved["last_path"] is None else Path(saved["last_path"])
        elif start is not Start.CONTINUED:
            if has_trained(trainer):
                raise ValueError(
                    "TrainedOnlyCheckpoint must see the weights of the base, and this run starts with trained ones: "
                    "resume from a checkpoint of a run that had it from the start, or leave it out"
                )
            self._base = marks_of(pl_module)
        self._runs.begun(pl_module)
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise ValueError("TrainedOnlyCheckpoint: no parameter requires a gradient, so there is nothing to keep")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.schedule.passes_step(self._step, trainer.global_step):
            self._save(trainer, pl_module, trainer.current_epoch)
        self._step = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.schedule.ends_epoch(trainer.current_epoch + 1):
            self._save(trainer, pl_module, trainer.current_epoch)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._runs.fit_ended()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._runs.ended()

    @property
    @override
    def own_key(self) -> str:
        return self._generate_state_key(
            dirpath=None if self.dirpath is None else str(self.dirpath),
            filename=self.filename,
            every_n_epochs=self.schedule.every_n_epochs,
            every_n_train_steps=self.schedule.every_n_train_steps,
            monitor=self.monitor,
            mode=self.mode,
        )

    def __repr__(self) -> str:
        shown = {
            "dirpath": None if self.dirpath is None else str(self.dirpath),
            "filename": self.filename,
            "every_n_epochs": self.schedule.every_n_epochs,
            "every_n_train_steps": self.schedule.every_n_train_steps,
            "monitor": self.monitor,
        }
        arguments = (f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"TrainedOnlyCheckpoint({', '.join(arguments)})"

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._runs.announced_only or not self._base:
            return self._runs.to_save()
        path = None if self.last_path is None else str(self.last_path)
        return {"base": dict(self._base), "best_score": self.best_score, "last_path": path}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._runs.loaded(state_dict or self._runs.state or {})

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        score = None
        if self.monitor is not None:
            if self.monitor not in trainer.callback_metrics:
                raise ValueError(
                    f"TrainedOnlyCheckpoint(monitor={self.monitor!r}): no such figure has been logged, only "
                    f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}; list it after the callback that logs it"
                )
            score = float(trainer.callback_metrics[self.monitor])
            better = self.best_score is None or (
                score > self.best_score if self.mode == "max" else score < self.best_score
            )
            if not better:
                return
        adapter_for(trainer).settle(module)
        # Whole tensors of shards are gathered by all processes together.
        tensors = trained_tensors(module, self._base)
        folder = Path(self.dirpath if self.dirpath is not None else Path(trainer.default_root_dir, "trained"))
        path = folder / (self.filename.format(epoch=epoch, step=trainer.global_step) + ".safetensors")
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            save_trained(path, tensors, self._base)
            old = self.last_path
            if self.monitor is not None and old is not None and old != path:
                old.unlink(missing_ok=True)
            rank_zero_info(f"TrainedOnlyCheckpoint wrote {len(tensors)} tensors to {path}")
        self.last_path, self.best_score = path, score


def marks_of(module: nn.Module) -> dict[str, str]:
    """The fingerprint of each tensor of a module's state; a collective call where they are sharded."""
    return {name: fingerprint(whole(tensor)) for name, tensor in module.state_dict().items() if _is_tensor(tensor)}


def trained_tensors(module: nn.Module, base: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that differ from the base or require a gradient, whole and on the CPU."""
    required = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    kept, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not _is_tensor(tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))  # tied weights are kept once
        value = whole(tensor.detach())
        if id(tensor) in required or base.get(name) != fingerprint(value):
            kept[name] = value.cpu().contiguous().clone()
    return kept


def save_trained(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], base: Mapping[str, str]) -> None:
    """Write tensors and the fingerprints of their base to a safetensors file, atomically."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "base": json.dumps(dict(base)),
        "marks": json.dumps({name: fingerprint(tensor) for name, tensor in tensors.items()}),
    }
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)


def load_trained(module: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Put what :class:`TrainedOnlyCheckpoint` wrote onto the base that it belongs to.

    Everything is checked before anything is changed.

    Args:
        module: with the base's weights: the LightningModule, or the model within it.
        path: the file.

    Returns:
        The names of the tensors that were loaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another file or damaged, or the module has not the weights of that base.
    """
    tensors, base = _read(Path(path))
    state = module.state_dict()
    prefix = _prefix(tensors, state, path)
    names = {name.removeprefix(prefix): name for name in tensors}
    for name, value in state.items():
        mark = base.get(prefix + name)
        if not _is_tensor(value) or (mark is None and name not in names):
            continue
        if name in names and tensors[names[name]].shape != value.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[names[name]].shape)}, and the module's has "
                f"{tuple(value.shape)}: load the model that it was trained from"
            )
        if mark is not None and fingerprint(whole(value)) != mark:
            raise ValueError(
                f"{path} belongs to another base: its {name} is not that of this module; load the weights from which "
                "that run started first"
            )
    with torch.no_grad():
        for name, own in names.items():
            state[name].copy_(tensors[own])
    return list(names)


def save_full(module: nn.Module, path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a whole checkpoint of a base with what trains on it, which ``load_state_dict`` takes.

    For a transformers model, call :func:`load_trained` and then the model's own ``save_pretrained``.

    Args:
        module: with the base's weights; they are replaced by the trained ones.
        path: the file of :class:`TrainedOnlyCheckpoint`.
        target: ends in ``.safetensors`` (tied tensors once), or is written with ``torch.save`` as
            ``{"state_dict": …}``.
    """
    load_trained(module, path)
    state = {name: tensor for name, tensor in module.state_dict().items() if _is_tensor(tensor)}
    with replacing(target) as temporary:
        if str(target).endswith(".safetensors"):
            from safetensors.torch import save_file

            distinct = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
            kept = set(distinct.values())
            save_file({n: t.contiguous() for n, t in state.items() if n in kept or not t.numel()}, temporary)
        else:
            torch.save({"state_dict": state}, temporary)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _prefix(tensors: Mapping[str, Tensor], state: Mapping[str, Any], path: Any) -> str:
    """What the names in the file have before those of the module, such as a LightningModule's ``model.``."""
    first = next(iter(tensors))
    for start in (0, *(place + 1 for place, letter in enumerate(first) if letter == ".")):
        prefix = first[:start]
        if all(name.startswith(prefix) and name[start:] in state for name in tensors):
            return prefix
    raise ValueError(f"{path}: the module has no tensor {first}; load the model that it was trained from")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a truncated one ({error})") from error
    if metadata.get("format") != FORMAT or not tensors:
        raise ValueError(f"{path} was not written by TrainedOnlyCheckpoint: it lacks the mark format={FORMAT!r}")
    marks: dict[str, str] = json.loads(metadata["marks"])
    for name, tensor in tensors.items():
        if fingerprint(tensor) != marks.get(name):
            raise ValueError(f"{path} is damaged: the content of {name} has changed since it was written")
    base: dict[str, str] = json.loads(metadata["base"])
    return tensors, base
