"""Sharded weights: read whole one for each process at a time, and left as they are found."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import summarize
from ranks import RankFailed, on_ranks
from script import STRATEGIES, Net, data, probes
from tiny import Spy, make_trainer, numpy_kappa, numpy_ranking, trainable
from torch.distributed.tensor import DTensor

import kappa_lightning.profile.distributed
from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, KappaProfile
from kappa_lightning.weights.sharded import whole


def fit(name: str, root: Path, *callbacks: Any, epochs: int = 1) -> tuple[Any, Net]:
    devices, make = STRATEGIES[name]
    trainer = make_trainer(
        root, *callbacks, strategy=make(), devices=devices, use_distributed_sampler=False, max_epochs=epochs
    )
    module = Net()
    trainer.fit(module)
    return trainer, module


def count_whole_tensors(name: str, root: Path) -> tuple[list[int], int]:
    """How many whole copies of sharded weights are alive whenever another one is put together on this process."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []
    gathered: list[Any] = []
    collect, full_tensor = kappa_lightning.profile.distributed.collect, DTensor.full_tensor

    def counting(*arguments: Any) -> torch.Tensor | None:
        copy = collect(*arguments)
        if copy is not None:
            alive.add(copy)
            counts.append(len(alive))
        return copy

    def on_all(tensor: DTensor, **options: Any) -> torch.Tensor:
        gathered.append(tensor.shape)
        return full_tensor(tensor, **options)

    kappa_lightning.profile.distributed.collect = counting
    DTensor.full_tensor = on_all
    fit(name, root, KappaFreezeCallback(num_tensors=2, exclude=()), KappaMonitor(tensors="all"))
    return counts, len(gathered)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2+tp"])
def test_weights_are_put_together_one_at_a_time_on_the_process_that_decomposes_them(tmp_path: Path, name: str) -> None:
    results = on_ranks(count_whole_tensors, name, tmp_path, ranks=STRATEGIES[name][0])
    for counts, gathered in results:
        assert max(counts) == 1
        assert gathered == 0
    # All four for the profile, and the two that train again at the end of the epoch.
    assert sum(len(counts) for counts, _ in results) == len(Net.MATRICES) + 2


def look(name: str, root: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def at_first_batch(trainer: Any, module: Any) -> None:
        # At the first one, before a backward pass could have freed what the evaluation gathered.
        seen.setdefault("sharded", all(isinstance(parameter, DTensor) for parameter in module.parameters()))

    def after_backward(trainer: Any, module: Any) -> None:
        seen["gradients"] = [key for key, parameter in module.named_parameters() if parameter.grad is not None]

    freeze = KappaFreezeCallback(num_tensors=2, exclude=())
    spy = Spy(on_train_batch_start=at_first_batch, on_before_optimizer_step=after_backward)
    trainer, module = fit(name, root, freeze, ForgettingEval(probes()), spy)
    (optimizer,) = trainer.optimizers
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    seen["states"] = [names[id(parameter)] for parameter in optimizer.state]
    seen["profile"] = KappaProfile.from_model(module, progress=False, include=freeze.frozen_names).to_dict()["rows"]
    return seen


def test_parameters_are_sharded_again_when_training_starts_and_frozen_ones_cost_nothing(tmp_path: Path) -> None:
    lowest = sorted(numpy_ranking(Net(), Net.MATRICES)[:2])
    for seen in on_ranks(look, "fsdp2", tmp_path):
        assert seen["sharded"]
        assert sorted(seen["gradients"]) == sorted(seen["states"]) == lowest


def test_profile_of_a_sharded_module_without_a_trainer_is_that_of_the_whole_one(tmp_path: Path) -> None:
    frozen = numpy_ranking(Net(), Net.MATRICES)[2:]
    expected = {row.name: row.to_dict() for row in KappaProfile.from_model(Net(), progress=False)}
    for seen in on_ranks(look, "fsdp2", tmp_path):
        assert {row["name"]: row for row in seen["profile"]} == {name: expected[name] for name in frozen}


def watch_after_a_forward_pass(root: Path) -> tuple[list[float], list[float]]:
    """Lightning's sanity check leaves the root's parameters whole, in memory that is freed when training begins."""

    def predict(trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module(data()[:][0])

    monitor = KappaMonitor(tensors=["head.weight"])
    _, module = fit("fsdp2", root, Spy(on_train_start=predict), monitor)
    kappas = [record["kappa"]["head.weight"] for record in monitor.history]
    return kappas, [numpy_kappa(Net().head.weight), numpy_kappa(whole(module.head.weight))]


def test_figures_are_of_the_weights_that_train_although_a_forward_pass_had_gathered_them(tmp_path: Path) -> None:
    for kappas, expected in on_ranks(watch_after_a_forward_pass, tmp_path):
        assert kappas == pytest.approx(expected, rel=1e-3)
        assert kappas[0] != kappas[1]


def two_fits(name: str, root: Path) -> dict[str, Any]:
    freeze, monitor = KappaFreezeCallback(num_tensors=2, exclude=()), KappaMonitor()
    trainer, module = fit(name, root, freeze, monitor)
    first, between = freeze.trained_names, {key: whole(p).clone() for key, p in module.named_parameters()}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    moved = [key for key, parameter in module.named_parameters() if not torch.equal(whole(parameter), between[key])]
    found = {"first": first, "second": freeze.trained_names, "moved": moved, "requires_grad": trainable(module)}
    freeze.unfreeze()
    return found | {"steps": [record["step"] for record in monitor.history], "unfrozen": trainable(module)}


@pytest.mark.parametrize("name", ["fsdp2", "tp"])
def test_second_fit_goes_on_with_the_same_tensors(tmp_path: Path, name: str) -> None:
    for result in on_ranks(two_fits, name, tmp_path):
        assert sorted(result["first"]) == sorted(numpy_ranking(Net(), Net.MATRICES)[:2])
        assert result["first"] == result["second"] == result["moved"] == result["requires_grad"]
        assert result["steps"] == [0, 3, 6]
        assert result["unfrozen"] == [name for name, _ in Net().named_parameters()]


def summary(root: Path) -> int:
    counts: list[int] = []

    class Reading(ModelSummary):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            counts.append(summarize(pl_module).trainable_parameters)

    fit("fsdp2", root, Reading(), KappaFreezeCallback(num_tensors=2, exclude=()))
    return counts[0]


def test_summary_counts_the_whole_tensors_that_train(tmp_path: Path) -> None:
    parameters = dict(Net().named_parameters())
    expected = sum(parameters[name].numel() for name in numpy_ranking(Net(), Net.MATRICES)[:2])
    assert on_ranks(summary, tmp_path) == [expected, expected]


class Parametrized(Net):
    """One layer is made from others that are sharded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make = {
            "spectral": torch.nn.utils.parametrizations.spectral_norm,
            "orthogonal": torch.nn.utils.parametrizations.orthogonal,
            "weight": torch.nn.utils.parametrizations.weight_norm,
        }[kind]
        make(self.up)


def profile_parametrized(name: str, root: Path, kind: str) -> dict[str, float]:
    devices, make = STRATEGIES[name]
    freeze, module = KappaFreezeCallback(num_tensors=2, exclude=()), Parametrized(kind)
    trainer = make_trainer(root, freeze, strategy=make(), devices=devices, use_distributed_sampler=False)
    trainer.fit(module)
    return {row.name: row.kappa for row in freeze.profile}


@pytest.mark.parametrize("kind", ["spectral", "orthogonal", "weight"])
def test_weights_made_from_sharded_ones_are_read_as_they_are_on_one_process(tmp_path: Path, kind: str) -> None:
    (one,) = on_ranks(profile_parametrized, "one", tmp_path, kind, ranks=1)
    for many in on_ranks(profile_parametrized, "fsdp2", tmp_path, kind):
        assert many == pytest.approx(one, rel=1e-9)


def with_other_candidates(root: Path) -> None:
    module = Net()
    module.up.weight.requires_grad_(os.environ["RANK"] == "0")
    devices, make = STRATEGIES["fsdp2"]
    make_trainer(root, KappaFreezeCallback(), strategy=make(), devices=devices, use_distributed_sampler=False).fit(
        module
    )


def test_processes_with_other_candidates_stop_before_they_read_each_others_shards(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"do not profile the same tensors, up\.weight first"):
        on_ranks(with_other_candidates, tmp_path, timeout=60)
