"""What a LightningModule and a Trainer can do besides the plain loop, compared with a module frozen by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from ranks import on_ranks
from tiny import Bank, Down, Spy, grouped_names, make_trainer, numpy_kappa, numpy_ranking, trainable
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, Probe
from kappa_lightning.weights.sharded import whole

MATRICES = ("a.weight", "b.weight", "c.weight", "d.weight")
STRATEGIES = {
    "one": (1, lambda **_: "auto"),
    "ddp": (2, lambda **options: DDPStrategy(**options)),
    "fsdp2": (2, lambda **_: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
}


class Net(Bank):
    """Four layers of which the callback is to train two, all used in one forward pass."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(_sgd, a=(4, 3.0), b=(6, 2.0), c=(5, 9.0), d=(3, 5.0))

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            for layer in self.layers():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.a(batch[0][:, :4])


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)


class Compiled(Net):
    """The whole module and, under their own names, two of its layers are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.compile(self.a, backend="eager")
        self.c.compile(backend="eager")

    def layers(self) -> list[Any]:
        return [self.a, self.b, self.c, self.d]


class Manual(Net):
    """Two optimizers and two schedulers stepped by hand, one of which loses all its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        pairs = [(self.a, self.b), (self.c, self.d)]
        optimizers = [torch.optim.SGD([p for m in pair for p in m.parameters()], lr=0.1) for pair in pairs]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()
        self.rates.append(self.optimizers()[0].param_groups[0]["lr"])


class Late(Net):
    """Makes its layers in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = {name: self._modules.pop(name) for name in "abcd"}

    def configure_model(self) -> None:
        for name, layer in self.waiting.items():
            self.add_module(name, layer)
        self.waiting = {}
        super().configure_model()


class Loaded(Net):
    """Starts from weights of another ranking, which it loads in setup."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers():
            layer.weight.data.fill_diagonal_(1.0 + layer.in_features)

    def setup(self, stage: str) -> None:
        self.load_state_dict(Net().state_dict())


SCENARIOS: dict[str, tuple[type[Net], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "compiled": (Compiled, {}, {}, ("one", "ddp")),
    "plain": (Net, {}, {}, ("one", "ddp", "fsdp2")),
    "clipped": (Net, {"gradient_clip_val": 0.05}, {}, ("one", "ddp", "fsdp2")),
    "accumulated": (Net, {"accumulate_grad_batches": 2}, {}, ("one", "ddp", "fsdp2")),
    "static graph": (Net, {}, {"static_graph": True}, ("ddp",)),
    "manual": (Manual, {}, {}, ("one", "ddp", "fsdp2")),
    "manual, static graph": (Manual, {}, {"static_graph": True}, ("ddp",)),
    "late": (Late, {}, {}, ("one", "ddp", "fsdp2")),
    "loaded": (Loaded, {}, {}, ("one", "ddp", "fsdp2")),
}
"""For each the module, what the Trainer and what DDPStrategy are given, and the strategies that have it."""
CASES = [
    (strategy, scenario) for strategy in STRATEGIES for scenario in SCENARIOS if strategy in SCENARIOS[scenario][3]
]


def samples(rank: int = 0, processes: int = 1, batch_size: int = 8) -> DataLoader:
    """Every ``processes``-th sample of 24, in order; Lightning's own sampler would shuffle them."""
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x[rank::processes]), batch_size=batch_size // processes)


def callbacks() -> tuple[KappaFreezeCallback, KappaMonitor, ForgettingEval]:
    probe = Probe(samples(batch_size=5), Down(), lambda module, batch: module.loss(batch))
    return KappaFreezeCallback(num_tensors=2), KappaMonitor(), ForgettingEval({"old": probe})


def train(strategy: str, scenario: str, root: Path, by_hand: bool = False) -> dict[str, Any]:
    """Two epochs, with the callbacks or with what they select frozen by hand."""
    processes, make = STRATEGIES[strategy]
    kind, options, strategy_options, _ = SCENARIOS[scenario]
    module, seen = kind(), {}
    freeze, monitor, forgetting = callbacks()
    if by_hand:
        chosen = numpy_ranking(Net(), MATRICES)[:2]
        spy = Spy(on_fit_start=lambda _, module: _freeze(module, chosen))
    else:
        spy = Spy(on_train_batch_end=lambda _, module: seen.setdefault("first step", _weights(module)))
    trainer = make_trainer(
        root,
        *([spy] if by_hand else [freeze, monitor, forgetting, spy]),
        strategy=make(**strategy_options),
        devices=processes,
        max_epochs=2,
        use_distributed_sampler=False,
        **options,
    )
    data = samples(trainer.global_rank, processes)
    trainer.fit(torch.compile(module, backend="eager") if kind is Compiled else module, data)
    return {
        **seen,
        "selected": freeze.selected_names,
        "trains": [_plain(name) for name in trainable(module)],
        "groups": [[_plain(n) for names in grouped_names(module, o) for n in names] for o in trainer.optimizers],
        "weights": _weights(module),
        "kappa": [record["kappa"] for record in monitor.history],
        "retention": [record["forgetting/retention"] for record in forgetting.history],
        "steps": trainer.global_step,
        "rates": getattr(module, "rates", None),
    }


def _freeze(module: nn.Module, chosen: list[str]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(_plain(name) in chosen)


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {_plain(name): whole(p).detach().clone() for name, p in module.named_parameters()}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What freezing by hand gives in a scenario, on one process and without compilation."""
    root, results = tmp_path_factory.mktemp("by hand"), {}

    def run(scenario: str) -> dict[str, Any]:
        plain = "plain" if scenario == "compiled" else scenario
        if plain not in results:
            results[plain] = train("one", plain, root, by_hand=True)
        return results[plain]

    return run


@pytest.mark.parametrize(("strategy", "scenario"), CASES)
def test_callbacks_train_what_freezing_by_hand_trains(
    tmp_path: Path, by_hand: Any, strategy: str, scenario: str
) -> None:
    expected, before = by_hand(scenario), Net().state_dict()
    lowest = numpy_ranking(Net(), MATRICES)[:2]
    for result in on_ranks(train, strategy, scenario, tmp_path, ranks=STRATEGIES[strategy][0]):
        assert result["selected"] == lowest
        assert sorted(result["trains"]) == sorted(lowest)
        assert sorted(name for names in result["groups"] for name in names) == sorted(lowest)
        assert result["steps"] == expected["steps"]
        assert result["rates"] == expected["rates"]
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-5, atol=1e-6)
            assert torch.equal(tensor, before[name]) is (name not in lowest), name
        if scenario.startswith("manual"):
            assert [len(names) for names in result["groups"]] == [2, 0]
        if scenario == "clipped":
            moved = [(before[n] - result["first step"][n]) / 0.1 - 0.1 * before[n] for n in lowest]
            norm = torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in moved]))
            assert norm.item() == pytest.approx(0.05, rel=1e-3)


def lifecycle(strategy: str, root: Path) -> dict[str, Any]:
    """Every loop alone, before, between and after two fits, and with the checkpoint of the first."""
    processes, make = STRATEGIES[strategy]
    module, (freeze, monitor, forgetting), told = Net(), callbacks(), {}

    def trainer(*callbacks: Any, **options: Any) -> Any:
        options = {"strategy": make(), "devices": processes, "use_distributed_sampler": False, **options}
        return make_trainer(root, *callbacks, **options)

    def tell(when: str) -> None:
        told[when] = {
            "selected": list(freeze.selected_names),
            "trains": trainable(module),
            "weights": _weights(module),
            "baseline": dict(monitor.baseline),
            "kappa": [(record["epoch"], record["step"]) for record in monitor.history],
            "retention": [record["forgetting/retention"] for record in forgetting.history],
        }

    first = trainer(freeze, monitor, forgetting)
    data = samples(first.global_rank, processes)
    for loop in (first.validate, first.test, first.predict):
        loop(module, data)
    tell("before")
    first.fit(module, data, data)
    tell("fit")
    path = root / f"{strategy}.ckpt"
    first.save_checkpoint(path)
    for loop in (first.validate, first.test, first.predict):
        loop(module, data)
    tell("evaluated")
    first.fit_loop.max_epochs = 2
    first.fit(module, data, data)
    tell("fitted again")
    for loop in (first.validate, first.test, first.predict):
        loop(module, data, ckpt_path=path)
    tell("evaluated the checkpoint")
    second = trainer(freeze, monitor, forgetting)
    second.fit(module, data)
    tell("fitted by a new Trainer")
    return told


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loops_alone_and_between_fits_change_nothing(tmp_path: Path, strategy: str) -> None:
    everything = [name for name, _ in Net().named_parameters()]
    lowest = numpy_ranking(Net(), MATRICES)[:2]
    (one,) = [lifecycle("one", tmp_path)] if strategy != "one" else [None]
    for told in on_ranks(lifecycle, strategy, tmp_path, ranks=STRATEGIES[strategy][0]):
        assert told["before"]["trains"] == everything
        assert (told["before"]["selected"], told["before"]["kappa"], told["before"]["retention"]) == ([], [], [])
        for when in ("fit", "evaluated", "fitted again", "evaluated the checkpoint", "fitted by a new Trainer"):
            assert told[when]["selected"] == lowest
            assert sorted(told[when]["trains"]) == sorted(lowest)
            assert all(
                torch.equal(told[when]["weights"][n], t) for n, t in Net().state_dict().items() if n not in lowest
            )
        assert told["fit"]["kappa"] == [(0, 0), (1, 3)]
        assert _figures(told["evaluated"]) == _figures(told["fit"])
        assert told["fitted again"]["kappa"] == [(0, 0), (1, 3), (2, 6)]
        assert told["fitted again"]["baseline"] == told["fit"]["baseline"]
        assert told["fitted again"]["retention"][:2] == told["fit"]["retention"]
        assert _figures(told["evaluated the checkpoint"]) == _figures(told["fitted again"])
        assert told["fitted by a new Trainer"]["kappa"] == [(0, 0), (1, 3)]
        trained = told["evaluated the checkpoint"]["weights"]
        expected = {name: numpy_kappa(trained[name]) for name in lowest}
        assert told["fitted by a new Trainer"]["baseline"] == pytest.approx(expected, rel=1e-3)
        if one is not None:
            for when in told:
                assert told[when]["retention"] == pytest.approx(one[when]["retention"], rel=1e-5)
                torch.testing.assert_close(told[when]["weights"], one[when]["weights"], rtol=1e-5, atol=1e-6)


def _figures(told: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != "weights"}
