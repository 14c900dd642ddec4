"""``recoverable=k`` under one process, DDP and FSDP2: the same figures, and a run that goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from script import STRATEGIES, Mean, Net, data
from tiny import make_trainer

from kappa_lightning import AccuracyProbe, ForgettingEval, Probe
from kappa_lightning.weights.sharded import whole


def run(name: str, root: Path) -> dict[str, Any]:
    processes, make = STRATEGIES[name]
    tokens, labels = data()[:]
    batches = list(zip(tokens.split(4), labels.split(4), strict=True))
    found: dict[str, Any] = {}
    for recoverable in (None, 3):
        loss = Probe(batches, Mean(), lambda module, batch: module.loss(batch), loss=lambda m, batch: m.loss(batch))
        probes = {"loss": loss, "classes": AccuracyProbe(batches, chance=None)}
        forgetting = ForgettingEval(probes, every_n_train_steps=2, recoverable=recoverable)
        trainer = make_trainer(
            root / name, forgetting, strategy=make(), devices=processes, use_distributed_sampler=False, max_epochs=2
        )
        module = Net()
        trainer.fit(module)
        found[str(recoverable)] = {
            "history": forgetting.history,
            "weights": {key: whole(value).clone() for key, value in module.state_dict().items()},
        }
    return found


@pytest.mark.slow
def test_what_comes_back_is_the_same_and_the_run_does_not_notice(tmp_path: Path) -> None:
    (one,) = on_ranks(run, "one", tmp_path, ranks=1)
    history = one["3"]["history"]
    assert [record["step"] for record in history] == [0, 2, 4, 6]
    # Three steps at this rate do not leave a model as it was.
    assert all(record["forgetting/loss/recoverable"] != record["forgetting/loss/retention"] for record in history)
    for name in ("ddp", "fsdp2", "tp"):
        for rank in on_ranks(run, name, tmp_path):
            for expected, found in zip(history, rank["3"]["history"], strict=True):
                assert found == pytest.approx(expected, rel=1e-5), name
            without, beside = rank["None"]["weights"], rank["3"]["weights"]
            assert all(torch.equal(beside[key], without[key]) for key in without), name
