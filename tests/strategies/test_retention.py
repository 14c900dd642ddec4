"""Retention by steps, its intervals, κ and files of what trains are the same under one process, DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from script import STRATEGIES, Net, probes
from tiny import make_trainer

from kappa_lightning import ForgettingEval, KappaMonitor, TrainedOnlyCheckpoint


def run(name: str, root: Path) -> dict[str, Any]:
    processes, make = STRATEGIES[name]
    forgetting = ForgettingEval(probes(), every_n_train_steps=2)
    monitor = KappaMonitor(every_n_train_steps=2)
    keep = TrainedOnlyCheckpoint(root / name)
    trainer = make_trainer(
        root, forgetting, monitor, keep, strategy=make(), devices=processes, use_distributed_sampler=False, max_epochs=2
    )
    trainer.fit(Net())
    return {"retention": forgetting.history, "kappa": monitor.history, "path": str(keep.last_path)}


@pytest.mark.slow
def test_figures_by_steps_are_those_of_one_process(tmp_path: Path) -> None:
    (one,) = on_ranks(run, "one", tmp_path, ranks=1)
    assert [record["step"] for record in one["retention"]] == [0, 2, 4, 6]
    assert "forgetting/classes/retention_low" in one["retention"][-1]
    for name in ("ddp", "fsdp2"):
        for rank in on_ranks(run, name, tmp_path):
            for expected, found in zip(one["retention"], rank["retention"], strict=True):
                # The loss of a batch has batches as items; sums in another order differ in their last bits.
                assert found == pytest.approx(expected, rel=1e-5), name
            for expected, found in zip(one["kappa"], rank["kappa"], strict=True):
                assert found["kappa"] == pytest.approx(expected["kappa"], rel=1e-5), name
            kept, wanted = load_file(rank["path"]), load_file(one["path"])
            assert kept.keys() == wanted.keys()
            assert all(torch.allclose(kept[key], wanted[key], rtol=1e-5) for key in kept), name
