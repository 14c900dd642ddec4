"""Selection, freeze and retention in every precision, on one process, under DDP and under FSDP2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import on_ranks
from tiny import Bank, Down, Spy, make_trainer, numpy_kappa, numpy_ranking, trainable
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, Probe
from kappa_lightning.weights.sharded import whole

STRATEGIES = {
    "one": (1, lambda: "auto"),
    "ddp": (2, lambda: "ddp"),
    "fsdp2": (2, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
}
STORED = {
    "32-true": torch.float32,
    "16-mixed": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
}
"""The dtype in which each precision keeps the weights; on a CPU Lightning turns "16-mixed" into "bf16-mixed"."""
TOLERANCE = {"32-true": 1e-5, "64-true": 1e-5}
UNKNOWN_TO_FSDP2 = ("16-mixed", "64-true")
"""What Lightning refuses with ModelParallelStrategy."""
CASES = [(s, p) for s in STRATEGIES for p in STORED if not (s == "fsdp2" and p in UNKNOWN_TO_FSDP2)]


class Net(Bank):
    """Three square layers, of which the first two change places in the ranking when they are rounded to bfloat16."""

    MATRICES = ("a.weight", "b.weight", "c.weight")

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(_sgd, a=(6, 1650.0), b=(8, 1450.0), c=(4, 1e6))
        for layer in self.layers():
            layer.weight.data /= layer.weight.norm()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in self.layers():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def _sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.5)


def samples(batch_size: int, rank: int = 0, processes: int = 1) -> DataLoader:
    """Every ``processes``-th sample of 24, in order; Lightning's own sampler would shuffle them."""
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x[rank::processes]), batch_size=batch_size)


def train(name: str, root: Path) -> dict[str, dict[str, Any]]:
    """Two epochs in each precision, one after the other in the same processes."""
    processes, make = STRATEGIES[name]
    results = {}
    for precision in [precision for strategy, precision in CASES if strategy == name]:
        before: dict[str, Tensor] = {}
        module, freeze, monitor = Net(), KappaFreezeCallback(num_tensors=1), KappaMonitor()
        forgetting = ForgettingEval({"old": Probe(samples(5), Down(), lambda module, batch: module.loss(batch))})
        spy = Spy(on_fit_start=lambda _, module, before=before: before.update(_whole(module)))
        options = {"strategy": make(), "devices": processes, "precision": precision, "use_distributed_sampler": False}
        trainer = make_trainer(root, freeze, monitor, forgetting, spy, max_epochs=2, **options)
        trainer.fit(module, samples(8 // processes, trainer.global_rank, processes))
        results[precision] = {
            "precision": trainer.precision,
            "selected": freeze.selected_names,
            "kappa": {row.name: row.kappa for row in freeze.profile},
            "dtype": {row.dtype for row in freeze.profile},
            "trains": trainable(module),
            "before": before,
            "after": _whole(module),
            "monitored": monitor.history[-1]["kappa"],
            "retention": [record["forgetting/retention"] for record in forgetting.history],
        }
    return results


def _whole(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in module.named_parameters()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, dict[str, Any]]]]:
    """By strategy, for each of its processes, by precision."""
    return {
        name: on_ranks(train, name, tmp_path_factory.mktemp(name), ranks=processes)
        for name, (processes, _) in STRATEGIES.items()
    }


def test_rounding_to_bfloat16_changes_the_ranking() -> None:
    assert numpy_ranking(Net(), Net.MATRICES)[0] == "b.weight"
    assert numpy_ranking(Net().bfloat16(), Net.MATRICES)[0] == "a.weight"


@pytest.mark.parametrize(("strategy", "precision"), CASES)
def test_selection_is_that_of_numpy_on_the_weights_as_they_are_stored(
    found: dict[str, Any], strategy: str, precision: str
) -> None:
    stored = Net().to(STORED[precision])
    expected = {name: numpy_kappa(stored.get_parameter(name)) for name in Net.MATRICES}
    for rank in found[strategy]:
        result = rank[precision]
        assert result["precision"] == precision.replace("16-mixed", "bf16-mixed").replace("bfbf", "bf")
        assert result["kappa"] == pytest.approx(expected, rel=1e-3)
        assert result["dtype"] == {str(STORED[precision]).removeprefix("torch.")}
        assert result["selected"] == result["trains"] == numpy_ranking(stored, Net.MATRICES)[:1]


@pytest.mark.parametrize(("strategy", "precision"), CASES)
def test_only_the_selected_tensor_moves_and_the_others_are_bit_identical(
    found: dict[str, Any], strategy: str, precision: str
) -> None:
    stored = dict(Net().to(STORED[precision]).named_parameters())
    for rank in found[strategy]:
        result = rank[precision]
        for name, tensor in result["after"].items():
            assert torch.equal(result["before"][name], stored[name].detach()), name
            assert torch.equal(tensor, stored[name].detach()) is (name not in result["selected"]), name
            assert torch.equal(tensor, found[strategy][0][precision]["after"][name]), name


@pytest.mark.parametrize(("strategy", "precision"), CASES)
def test_figures_after_training_are_those_of_the_trained_weights(
    found: dict[str, Any], strategy: str, precision: str
) -> None:
    for rank in found[strategy]:
        result = rank[precision]
        expected = {name: numpy_kappa(result["after"][name]) for name in result["selected"]}
        assert result["monitored"] == pytest.approx(expected, rel=1e-3)
        assert result["retention"][0] == 1
        assert all(math.isfinite(value) and value != 1 for value in result["retention"][1:])
        assert result["retention"] == found[strategy][0][precision]["retention"]
        expected = found["one"][0][precision]["retention"]
        assert result["retention"] == pytest.approx(expected, rel=TOLERANCE.get(precision, 0.01))
