"""Processes that Lightning starts itself, callbacks that travel to them, and a configuration from a file."""

from __future__ import annotations

import atexit
import copy
import os
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed
import yaml
from lightning.pytorch.cli import LightningCLI
from ranks import on_ranks
from tiny import Spy, TinyNet, loader, make_trainer, numpy_ranking, trainable
from torch.utils.data import DataLoader

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor


class LeaveAtExit(pl.Callback):
    """Destroys the process group when a process ends, or gloo's threads may abort it when its memory is taken down."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(strategy: str, root: Path) -> dict[str, Any]:
    """A fit in processes that the Trainer starts, and what of it comes back to the one that called it."""
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ.pop("MASTER_PORT", None)
    module = TinyNet()
    freeze, monitor = KappaFreezeCallback(num_tensors=2, profile=root / "profile.json"), KappaMonitor()
    forgetting = ForgettingEval({"old": AccuracyProbe(loader(), chance=None)})
    trainer = make_trainer(root, freeze, monitor, forgetting, LeaveAtExit(), strategy=strategy, devices=2)
    trainer.fit(module, loader())
    return {
        "metrics": {tag: value.item() for tag, value in trainer.callback_metrics.items()},
        "weights": {name: tensor.detach().clone() for name, tensor in module.named_parameters()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_lightning_starts(tmp_path: Path, strategy: str) -> None:
    (told,) = on_ranks(launch, strategy, tmp_path, ranks=1, timeout=150)
    lowest = numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2]
    before = TinyNet().state_dict()
    moved = [name for name, tensor in told["weights"].items() if not torch.equal(tensor, before[name])]
    assert sorted(moved) == sorted(lowest)
    assert {tag for tag in told["metrics"] if tag.startswith("kappa/")} == {
        "kappa/median",
        *(f"kappa/{n}" for n in lowest),
    }
    assert told["metrics"]["forgetting/retention"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def _callbacks() -> list[Any]:
    return [
        KappaFreezeCallback(num_tensors=2),
        KappaMonitor(),
        ForgettingEval({"old": AccuracyProbe(loader(), chance=None)}),
    ]


def travel(processes: int, root: Path) -> list[Any]:
    """Copies of the callbacks from every moment of a fit, each used for a fit of a new module."""
    callbacks = _callbacks()
    copies: dict[str, list[Any]] = {}

    def take(when: str) -> None:
        copies[f"pickled {when}"] = pickle.loads(pickle.dumps(callbacks))  # noqa: S301 - made here
        copies[f"copied {when}"] = copy.deepcopy(callbacks)

    spy = Spy(**{hook: lambda *_, hook=hook: take(hook) for hook in ("on_fit_start", "on_train_batch_end")})
    take("before")
    module = TinyNet()
    options = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    make_trainer(root, *callbacks, spy, **options).fit(module, loader())
    take("after")
    frozen_by_copies = trainable(module)
    told = []
    for when, (freeze, monitor, forgetting) in copies.items():
        known = (list(freeze.trained_names), len(monitor.history), len(forgetting.history))
        freeze.unfreeze()
        assert trainable(module) == frozen_by_copies
        module_of_copy = TinyNet()
        make_trainer(root, freeze, monitor, forgetting, **options).fit(module_of_copy, loader())
        same = (freeze.trained_names, monitor.history, forgetting.history)
        told.append((when, known, trainable(module_of_copy), same))
    return [(callbacks[0].trained_names, callbacks[1].history, callbacks[2].history), told]


@pytest.mark.parametrize("processes", [1, 2])
def test_callbacks_travel_at_any_moment_and_work_elsewhere(tmp_path: Path, processes: int) -> None:
    for original, told in on_ranks(travel, processes, tmp_path, ranks=processes):
        trained = sorted(numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2])
        assert sorted(original[0]) == trained
        assert len(told) == 8
        for when, known, trains, same in told:
            started = "before" not in when
            assert sorted(known[0]) == (trained if started else []), when
            assert known[1] == known[2] == (2 if "after" in when else 1 if "batch" in when else 0), when
            assert sorted(trains) == trained, when
            assert same == original, when


class Configurable(TinyNet):
    """LightningCLI reads its arguments from the signature: none."""

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        return loader()


def from_file(strategy: str, root: Path) -> tuple[list[str], list[str]]:
    cli = LightningCLI(
        Configurable, save_config_callback=None, args=["fit", "--config", str(root / f"{strategy}.yaml")]
    )
    freeze = next(callback for callback in cli.trainer.callbacks if isinstance(callback, KappaFreezeCallback))
    return freeze.selected_names, trainable(cli.model)


def test_lightning_cli_with_ddp_in_the_file(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "kappa_lightning.KappaFreezeCallback", "init_args": {"num_tensors": 2}},
        {"class_path": "kappa_lightning.KappaMonitor"},
    ]
    trainer = {"callbacks": callbacks, "accelerator": "cpu", "logger": False, "max_epochs": 1}
    trainer |= {"strategy": "ddp", "devices": 2, "enable_progress_bar": False, "enable_checkpointing": False}
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump({"trainer": trainer, "seed_everything": 3}))
    expected = numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2]
    for selected, trains in on_ranks(from_file, "ddp", tmp_path):
        assert selected == expected
        assert sorted(trains) == sorted(expected)
