"""Signal and sensitivity are the same whichever strategy measures them, and every process chooses alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from script import STRATEGIES, Net, data
from tiny import make_trainer, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import SensitivityFreezeCallback
from kappa_lightning.weights.sharded import whole


class Plain(Net):
    """With a shuffled dataloader as people write it, which Lightning deals out; logs in every step."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), batch_size=4, shuffle=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss


class Pictures(Plain):
    """The same network on floating-point inputs, which it can change until it recognizes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Linear(12, 6, bias=False).double()

    def train_dataloader(self) -> DataLoader[Any]:
        tokens, labels = data().tensors
        pictures = nn.functional.one_hot(tokens, 12).double() + 0.1 * torch.arange(12)
        return DataLoader(TensorDataset(pictures, labels), batch_size=4, shuffle=True)


def choose_by_pictures(name: str, root: Path) -> dict[str, Any]:
    processes, make = STRATEGIES[name]
    callback = SensitivityFreezeCallback(num_tensors=2, batches=3, exclude=())
    trainer = make_trainer(root, callback, strategy=make(), devices=processes, max_epochs=1)
    trainer.fit(Pictures())
    assert callback.profile is not None
    return {
        "rows": {row.name: (row.signal, row.sensitivity) for row in callback.profile},
        "trained": callback.trained_names,
        "reference": callback.profile.settings.reference,
    }


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_inputs_are_synthesized_alike_in_every_process(tmp_path: Path, name: str) -> None:
    (one,) = on_ranks(choose_by_pictures, "one", tmp_path / "one", ranks=1)
    assert "recognizes" in one["reference"]
    for result in on_ranks(choose_by_pictures, name, tmp_path / name, ranks=2):
        assert result["trained"] == one["trained"]
        for tensor, figures in one["rows"].items():
            assert result["rows"][tensor] == pytest.approx(figures, rel=1e-6, abs=1e-9), tensor


def choose(name: str, root: Path) -> dict[str, Any]:
    processes, make = STRATEGIES[name]
    found: dict[str, Any] = {}
    for method in ("gradient", "path", "trial"):
        callback = SensitivityFreezeCallback(num_tensors=2, method=method, batches=5, exclude=())
        module = Plain()
        before = snapshot(module)
        torch.manual_seed(17)  # of the order in which it trains
        trainer = make_trainer(root, callback, strategy=make(), devices=processes, max_epochs=1)
        trainer.fit(module)
        after = {key: whole(tensor.detach()) for key, tensor in module.named_parameters()}
        assert callback.profile is not None
        found[method] = {
            "rows": {row.name: (row.signal, row.sensitivity) for row in callback.profile},
            "ranking": [row.name for row in callback.profile.rank()],
            "trained": callback.trained_names,
            "rows_of_reference": callback.profile.settings.rows,
            "moved": sorted(key for key in after if not torch.equal(after[key], before[key])),
        }
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(choose, "one", tmp_path_factory.mktemp("one"), ranks=1)[0]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_figures_and_ranking_are_those_of_one_process(tmp_path: Path, one: dict[str, Any], name: str) -> None:
    for result in on_ranks(choose, name, tmp_path, ranks=2):
        for method, expected in one.items():
            assert result[method]["ranking"] == expected["ranking"]
            assert sorted(result[method]["trained"]) == sorted(expected["trained"]) == result[method]["moved"]
            assert result[method]["rows_of_reference"] == expected["rows_of_reference"] == 5 * 4
            for tensor, figures in expected["rows"].items():
                assert result[method]["rows"][tensor] == pytest.approx(figures, rel=1e-6, abs=1e-9), (method, tensor)
