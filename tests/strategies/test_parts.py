"""Single experts and heads train under DDP and FSDP2 as they do in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import RankFailed, on_ranks
from script import STRATEGIES, Net
from tiny import Spy, make_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional

from kappa_lightning import KappaFreezeCallback, KappaMonitor, PretrainedAnchor
from kappa_lightning.anchoring.pretrained import local
from kappa_lightning.parts import Part, train_parts
from kappa_lightning.weights.sharded import whole


class Experts(nn.Module):
    """Fused experts; three of them, so that no two processes have equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6) / 2)
        self.down_proj = nn.Parameter(torch.randn(3, 6, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for expert in range(3):
            gate, up = functional.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
            total = total + functional.linear(functional.silu(gate) * up, self.down_proj[expert])
        return total


class Mixture(Net):
    """The script's network with experts in place of its hidden layers; FSDP2 shards them with the layer around."""

    EXPERTS = ("mixture.experts.gate_up_proj", "mixture.experts.down_proj")

    def __init__(self, alone: bool = False) -> None:
        super().__init__(lambda module: torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.3))
        torch.manual_seed(4)
        self.mixture = nn.Sequential()
        self.mixture.add_module("experts", Experts())
        self.alone = alone
        del self.up, self.down
        self.double()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or getattr(self, "is_split", False):
            return
        self.is_split = True
        if mesh["tensor_parallel"].size() > 1:
            parallelize_module(self, mesh["tensor_parallel"], {"head": ColwiseParallel()})
            return
        for layer in (self.embed, self.mixture.experts if self.alone else self.mixture):
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self, mesh=mesh["data_parallel"])

    def features(self, tokens: Tensor) -> Tensor:
        return self.mixture(self.embed(tokens).mean(-2))


def train(
    name: str, root: Path, *, alone: bool = False, epochs: int = 2, ckpt_path: Any = None, **options: Any
) -> dict[str, Any]:
    devices, make = STRATEGIES[name]
    strategy = options.pop("strategy", None) or make()
    anchored = options.pop("anchored", False)
    arguments = {"num_tensors": 3, "experts": "each", "gate_up": "apart", "include": ["@experts"]}
    freeze, monitor = KappaFreezeCallback(**(arguments | options.pop("arguments", {}))), KappaMonitor()
    callbacks: list[Any] = [freeze, monitor]
    if "folder" in options:
        callbacks.append(ModelCheckpoint(options.pop("folder"), filename="{epoch}", save_top_k=-1))
    if anchored:
        callbacks.append(PretrainedAnchor(strength=0.5, reference="inputs"))
    module = Mixture(alone)
    trainer = make_trainer(
        root,
        *callbacks,
        strategy=strategy,
        devices=devices,
        use_distributed_sampler=False,
        max_epochs=epochs,
        **options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return {
        "trained": freeze.trained_names,
        "kappa": monitor.history,
        "states": sorted(
            (tuple(parameter.shape), local(parameter).numel(), len(state))
            for parameter, state in trainer.optimizers[0].state.items()
        ),
        "weights": {key: whole(tensor).detach().clone() for key, tensor in module.named_parameters()},
        "requires_grad": [key for key, parameter in module.named_parameters() if parameter.requires_grad],
    }


def entries_of(name: str) -> tuple[str, Any]:
    tensor, _, label = name.rstrip("]").partition("[")
    expert, _, half = label.partition(":")
    rows = {"": slice(None), "gate": slice(0, 5), "up": slice(5, 10)}[half]
    return tensor, (int(expert), rows)


def assert_exactly_these_moved(result: dict[str, Any]) -> None:
    for key, before in dict(Mixture().named_parameters()).items():
        frozen = torch.ones_like(before, dtype=torch.bool)
        for name in result["trained"]:
            tensor, entries = entries_of(name)
            if tensor == key:
                frozen[entries] = False
        after = result["weights"][key]
        assert torch.equal(after[frozen], before[frozen]), key
        assert (after[~frozen] != before[~frozen]).all(), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddp", {}),
        ("fsdp2", {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        ("fsdp2", {"alone": True, "anchored": True}),
    ],
)
def test_experts_train_on_several_processes_as_on_one(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    (one,) = on_ranks(train, "one", tmp_path, ranks=1, **options)
    assert len(one["trained"]) == 3
    assert_exactly_these_moved(one)
    results = []
    for many in on_ranks(train, name, tmp_path, **options):
        assert many["trained"] == one["trained"]
        assert many["requires_grad"] == []
        assert_exactly_these_moved(many)
        torch.testing.assert_close(many["weights"], one["weights"], rtol=1e-9, atol=1e-11)
        for mine, theirs in zip(many["kappa"], one["kappa"], strict=True):
            assert mine["kappa"] == pytest.approx(theirs["kappa"], rel=1e-3)
        assert [shape for shape, _, _ in many["states"]] == [shape for shape, _, _ in one["states"]]
        results.append(many)
    # Each process has its share of the chosen experts' state, and none of the others'.
    for place, ((rows, cols), _, _) in enumerate(one["states"]):
        sizes = [many["states"][place][1] for many in results]
        assert sizes == ([rows * cols] * 2 if name == "ddp" else [-(-rows // 2) * cols, rows // 2 * cols])


def train_twice(name: str, root: Path, distributed: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    def strategy() -> Any:
        if name == "ddp":
            return "ddp"
        return ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
        )

    whole_run = train(name, root, strategy=strategy(), folder=root / "whole")
    resumed = train(name, root, strategy=strategy(), folder=root / "rest", ckpt_path=root / "whole" / "epoch=0.ckpt")
    saved = {} if distributed else torch.load(root / "whole" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    return whole_run, resumed, list(saved)


@pytest.mark.parametrize(("name", "distributed"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str, distributed: bool) -> None:
    for whole_run, resumed, saved in on_ranks(train_twice, name, tmp_path, distributed, timeout=120):
        assert resumed["trained"] == whole_run["trained"]
        torch.testing.assert_close(resumed["weights"], whole_run["weights"], rtol=0, atol=0)
        assert saved == ([] if distributed else list(Mixture().state_dict()))


def train_blocks(sharded: bool) -> dict[str, Tensor]:
    """Three steps of a bare loop, in which a block of rows and a block of columns train, as heads are."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False)).double()
    if sharded:
        torch.distributed.init_process_group("gloo")
        fully_shard(layer)
    parts = [Part("0.weight", "head 1", (slice(1, 4),)), Part("2.weight", "head 0", (slice(None), slice(0, 3)))]
    training = train_parts(layer, parts)
    optimizer = torch.optim.AdamW(training.parameters.values(), lr=0.1, weight_decay=0.3)
    for step in range(3):
        batch = torch.randn(4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        if sharded:
            batch = batch.chunk(2)[torch.distributed.get_rank()]
        layer(batch).square().mean().backward()
        optimizer.step()
        training.store()
        optimizer.zero_grad()
    weights = {name: whole(tensor).detach().clone() for name, tensor in layer.state_dict().items()}
    training.undo()
    assert all(parameter.requires_grad for parameter in layer.parameters())
    return weights


def test_blocks_of_rows_and_columns_train_under_fsdp2_without_a_trainer() -> None:
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False)).double().state_dict()
    one = train_blocks(False)
    assert torch.equal(one["0.weight"][[0, 4, 5]], before["0.weight"][[0, 4, 5]])
    assert (one["0.weight"][1:4] != before["0.weight"][1:4]).all()
    for many in on_ranks(train_blocks, True):
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-11)
        assert torch.equal(many["0.weight"][[0, 4, 5]], before["0.weight"][[0, 4, 5]])
        assert torch.equal(many["2.weight"][:, 3:], before["2.weight"][:, 3:])


def train_a_part_of_a_split_tensor(root: Path) -> None:
    devices, make = STRATEGIES["tp"]
    module = Mixture()

    def choose(*_: Any) -> None:
        train_parts(module, [Part("head.weight", "first", (slice(0, 1),))])

    trainer = make_trainer(
        root, Spy(on_fit_start=choose), strategy=make(), devices=devices, use_distributed_sampler=False
    )
    trainer.fit(module)


def test_parts_of_what_tensor_parallelism_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"head\.weight is split by tensor parallelism .*use FSDP2"):
        on_ranks(train_a_part_of_a_split_tensor, tmp_path, timeout=30)
