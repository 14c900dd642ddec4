"""Signal and sensitivity are the same whichever strategy measures them, and every process chooses alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from script import STRATEGIES, Net, data
from tiny import make_trainer, snapshot
from torch.utils.data import DataLoader

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
