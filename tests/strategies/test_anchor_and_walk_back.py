"""The anchor and the way back on several processes give what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from ranks import on_ranks
from script import SAMPLES, STRATEGIES, Net, data, probes
from tiny import make_trainer
from torch import Tensor

from kappa_lightning import PretrainedAnchor, WalkBack
from kappa_lightning.weights.sharded import whole

RUNS: dict[str, dict[str, Any]] = {
    "recorded": {},
    "forward": {"source": "forward", "max_divergence": 0.001},
    "batch": {"reference": "batch", "weight_pull": 0.5},
}


def batches() -> list[tuple[Tensor]]:
    """Five and three samples, which no two processes share evenly."""
    tokens, _ = data()[: SAMPLES - 16]
    return [(tokens[:5],), (tokens[5:],)]


def run(name: str, root: Path, static_graph: bool = False) -> dict[str, Any]:
    """Each kind of anchor after the other in the same processes, interrupted and resumed, and a walk back."""
    processes, make = STRATEGIES[name]
    results: dict[str, Any] = {}
    for kind, options in RUNS.items():

        def anchor(options: dict[str, Any] = options) -> PretrainedAnchor:
            return PretrainedAnchor(**{"reference": batches(), "strength": 5.0, **options})

        def trainer(*callbacks: Any, **more: Any) -> Any:
            strategy = DDPStrategy(static_graph=True) if static_graph else make()
            options = {"strategy": strategy, "devices": processes, "use_distributed_sampler": False, **more}
            return make_trainer(root, *callbacks, log_every_n_steps=1, accumulate_grad_batches=1, **options)

        one, module = anchor(), Net()
        fit = trainer(one, max_epochs=2)
        fit.fit(module)
        results[kind] = {
            "weights": weights(module),
            "divergence": fit.callback_metrics["anchor/divergence"].item(),
            "task": fit.callback_metrics["anchor/new_task_divergence"].item(),
            "strength": one.strength,
        }
        if kind == "forward" and not static_graph:
            fit = trainer(anchor(), max_epochs=1)
            fit.fit(Net())
            fit.save_checkpoint(root / "half.ckpt")
            module = Net()
            trainer(anchor(), max_epochs=2).fit(module, ckpt_path=fit.strategy.broadcast(str(root / "half.ckpt")))
            results["resumed"] = weights(module)
    if not static_graph:
        module = Net()
        walk_back = WalkBack(
            monitor_limit=1e9, monitor=probes()["loss"], probes={"classes": probes()["classes"]}, points=[0.5]
        )
        walk_back.goal = type(walk_back.goal)(min_retention=0.01)
        trainer(walk_back, max_epochs=2).fit(module)
        results["walk"] = {"path": walk_back.path, "report": walk_back.report, "weights": weights(module)}
    return results


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in module.named_parameters()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(run, "one", tmp_path_factory.mktemp("one"), ranks=1)[0]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(
        run, request.param, tmp_path_factory.mktemp("many"), ranks=STRATEGIES[request.param][0], timeout=120
    )


def test_all_processes_train_as_one_does(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for result in many:
        for kind in RUNS:
            for name, tensor in one[kind]["weights"].items():
                torch.testing.assert_close(result[kind]["weights"][name], tensor, rtol=1e-4, atol=1e-6, msg=kind + name)
            for figure in ("divergence", "task", "strength"):
                assert result[kind][figure] == pytest.approx(one[kind][figure], rel=1e-3), (kind, figure)


def test_the_kinds_differ(one: dict[str, Any]) -> None:
    assert not torch.allclose(one["recorded"]["weights"]["up.weight"], one["batch"]["weights"]["up.weight"], rtol=1e-3)
    assert one["forward"]["strength"] != 5.0


def test_a_resumed_run_on_several_processes_equals_the_uninterrupted_one(many: list[dict[str, Any]]) -> None:
    for result in many:
        for name, tensor in result["forward"]["weights"].items():
            assert torch.equal(result["resumed"][name], tensor), name


def test_all_processes_walk_as_one_does(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for result in many:
        assert [point["chosen"] for point in result["walk"]["path"]] == [
            point["chosen"] for point in one["walk"]["path"]
        ]
        for point, expected in zip(result["walk"]["path"], one["walk"]["path"], strict=True):
            assert point["monitor"] == pytest.approx(expected["monitor"], rel=1e-4)
            assert point["retention"] == pytest.approx(expected["retention"], rel=1e-4)
        for name, tensor in one["walk"]["weights"].items():
            torch.testing.assert_close(result["walk"]["weights"][name], tensor, rtol=1e-6, atol=1e-9)


def test_a_static_graph_of_ddp_is_not_disturbed(one: dict[str, Any], tmp_path: Path) -> None:
    for result in on_ranks(run, "ddp", tmp_path, ranks=2, static_graph=True):
        for name, tensor in one["recorded"]["weights"].items():
            torch.testing.assert_close(result["recorded"]["weights"][name], tensor, rtol=1e-4, atol=1e-6)
