"""An evaluation by many processes: every sample counts once, and nobody waits for a batch that another has not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankFailed, on_ranks
from script import STRATEGIES, Mean, Net, adapt, data
from tiny import events, make_trainer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAUROC

from kappa_lightning import AccuracyProbe, ForgettingEval, Probe
from kappa_lightning.evaluation import SharedBatches
from kappa_lightning.strategies import Share


class Stream(IterableDataset):
    """Numbers of which nobody knows how many come."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(range(self.count))


def numbers(kind: str, count: int) -> Any:
    """Batches of one number each, from 0."""
    if kind == "list":
        return [torch.tensor([number]) for number in range(count)]
    dataset = Stream(count) if kind == "stream" else range(count)
    return DataLoader(dataset, batch_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["list", "stream", "dataset"])
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 11])
def test_every_batch_is_read_by_one_process(
    kind: str, lockstep: bool, limit: int | None, processes: int, count: int
) -> None:
    read, lengths = [], []
    for index in range(processes):
        batches = SharedBatches(numbers(kind, count), Share(index, processes, lockstep), limit=limit)
        mine = [(int(batch), counts) for batch, counts in batches]
        read.append([number for number, counts in mine if counts])
        lengths.append(len(mine))
        if batches.length is not None:
            assert batches.length == len(read[-1])
        assert batches.split == (processes > 1 and count >= processes)
    wanted = list(range(count if limit is None else min(count, limit * processes)))
    if processes > 1 and count >= processes:
        assert sorted(number for share in read for number in share) == wanted
        assert max(map(len, read)) - min(map(len, read)) <= 1
    else:
        assert read == [wanted] * processes
    if lockstep:
        assert len(set(lengths)) == 1


def test_batches_of_others_are_not_loaded() -> None:
    loaded = []

    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            loaded.append(index)
            return index

    batches = SharedBatches(DataLoader(Dataset(), batch_size=2), Share(1, 2))
    assert [batch.tolist() for batch, _ in batches] == [[2, 3], [6, 7]]
    assert loaded == [2, 3, 6, 7]


def test_sampler_that_shares_out_samples_itself_is_refused() -> None:
    loader = DataLoader(data(), sampler=DistributedSampler(data(), num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="DistributedSampler, which repeats samples"):
        SharedBatches(loader, Share(0, 2))


def evaluate_with(name: str, root: Path, make_probe: Any) -> Any:
    """Retention of one probe before the first step, and what else the probe tells."""
    devices, make = STRATEGIES[name]
    module = Net()  # which seeds the random numbers that a probe may leave different
    forgetting = ForgettingEval({"old": make_probe()})
    trainer = make_trainer(
        root, forgetting, strategy=make(), devices=devices, use_distributed_sampler=False, max_epochs=1
    )
    trainer.fit(module)
    return [record[f"forgetting/old/{forgetting.probes['old'].name}"] for record in forgetting.history]


def shuffled() -> Probe:
    """The order comes from random numbers that differ between the processes."""
    torch.manual_seed(int(os.environ["RANK"]))
    return AccuracyProbe(DataLoader(data(), batch_size=5, sampler=RandomSampler(data())), chance=None)


def streamed() -> Probe:
    return AccuracyProbe(Batches(batch_size=5), chance=None)


class Batches:
    """A dataloader that does not know its length."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Any:
        return iter(DataLoader(data(), batch_size=self.batch_size))


def single() -> Probe:
    return AccuracyProbe(Batches(batch_size=24), chance=None)


def listed() -> Probe:
    """A metric that keeps all samples, which are not as many on each process."""
    metric = MulticlassAUROC(num_classes=4)
    # Rounded, since two samples have the same three tokens in another order, whose tie the last bit would decide.
    return Probe(
        DataLoader(data(), batch_size=7), metric, lambda module, batch: (module(batch[0]).round(decimals=6), batch[1])
    )


def summed() -> Probe:
    """A sum, in which what two processes have both seen would count twice."""
    return Probe(DataLoader(data(), batch_size=5), Sum(), lambda module, batch: module.loss(batch))


def summed_single() -> Probe:
    return Probe([data()[:]], Sum(), lambda module, batch: module.loss(batch))


class Sum(SumMetric):
    """Of losses."""

    higher_is_better = False


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
@pytest.mark.parametrize("probe", [shuffled, streamed, single, listed, summed, summed_single])
def test_figures_are_those_of_one_process(tmp_path: Path, name: str, probe: Any) -> None:
    (one,) = on_ranks(evaluate_with, "one", tmp_path, probe, ranks=1)
    many = on_ranks(evaluate_with, name, tmp_path, probe)
    assert many[0] == many[1] == pytest.approx(one, rel=1e-6)


class Rounding(MeanMetric):
    """As if the processes ran on different hardware."""

    higher_is_better = True

    def compute(self) -> torch.Tensor:
        return super().compute() + 1e-6 * int(os.environ["RANK"])


def rounding() -> Probe:
    return Probe(DataLoader(data(), batch_size=5), Rounding(), lambda module, batch: module.loss(batch))


@pytest.mark.parametrize("name", ["ddp", "tp"])
def test_all_processes_see_the_same_figures_although_their_arithmetic_differs(tmp_path: Path, name: str) -> None:
    """Or one of them would stop at a limit that the others are above."""
    one, other = on_ranks(evaluate_with, name, tmp_path, rounding)
    assert one == other


class Normed(Net):
    """With BatchNorm, whose running statistics differ between processes that see different batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6).double()

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(super().features(tokens))


def evaluate_normed(root: Path) -> dict[str, Any]:
    module = Normed()
    probe = Probe(DataLoader(data(), batch_size=5), Mean(), lambda module, batch: module.loss(batch))
    forgetting = ForgettingEval({"old": probe})
    trainer = make_trainer(root, forgetting, strategy="ddp", devices=2, use_distributed_sampler=False, max_epochs=1)
    trainer.fit(module)
    own = module.norm.running_mean.clone()
    with torch.no_grad():
        losses = [module.eval().loss(batch).item() for batch in DataLoader(data(), batch_size=5)]
    logged = forgetting.history[-1]["forgetting/old/mean"]
    return {"logged": logged, "of this module": sum(losses) / len(losses), "own": own}


def test_buffers_are_those_of_the_checkpoint_while_a_module_is_evaluated_and_its_own_again_afterwards(
    tmp_path: Path,
) -> None:
    one, other = on_ranks(evaluate_normed, tmp_path)
    assert one["logged"] == other["logged"] == pytest.approx(one["of this module"], rel=1e-6)
    assert not torch.equal(one["own"], other["own"])


def count_forwards(name: str, root: Path) -> list[int]:
    forwards: list[int] = []
    probe = Probe(
        list(DataLoader(data(), batch_size=5)),
        Mean(),
        lambda module, batch: (forwards.append(len(batch[0])), module.loss(batch))[1],
    )
    evaluate_with(name, root, lambda: probe)
    return forwards[: len(forwards) // 2]


def test_sharded_modules_run_as_many_forward_passes_on_every_process(tmp_path: Path) -> None:
    """Five batches for two processes: the third forward pass of rank 1 only keeps rank 0 company."""
    assert on_ranks(count_forwards, "fsdp2", tmp_path) == [[5, 5, 4], [5, 5, 5]]
    assert on_ranks(count_forwards, "ddp", tmp_path) == [[5, 5, 4], [5, 5]]


def failing_on_one() -> Probe:
    def step(module: Net, batch: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise ArithmeticError("no such token")
        return module.loss(batch)

    return Probe(DataLoader(data(), batch_size=5), Mean(), step)


def test_step_that_fails_on_one_process_stops_all_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as failure:
        on_ranks(evaluate_with, "ddp", tmp_path, failing_on_one, timeout=60)
    of_first, of_second = str(failure.value).split("rank 1: Traceback")
    assert "RuntimeError: the process of rank 1 failed, so this one stops, too: ArithmeticError: no such" in of_first
    assert of_first.rstrip().endswith("in ForgettingEval's probe 'old'")
    assert "ArithmeticError: no such token" in of_second


def unsynchronized() -> Probe:
    return Probe(
        DataLoader(data(), batch_size=5), Mean(sync_on_compute=False), lambda module, batch: module.loss(batch)
    )


def test_metric_that_must_not_be_added_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="Mean has sync_on_compute=False"):
        on_ranks(evaluate_with, "ddp", tmp_path, unsynchronized)
    assert len(on_ranks(evaluate_with, "one", tmp_path, unsynchronized, ranks=1)[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_each_figure_is_logged_once(tmp_path: Path, name: str) -> None:
    on_ranks(adapt, name, tmp_path, logger=True)
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    log = events(folder)
    for tag in ("forgetting/retention", "forgetting/loss/mean", "kappa/median", "kappa_drift/max"):
        assert [event.step for event in log.Scalars(tag)] == [0, 3, 6], tag
    assert [event.step for event in log.Images("kappa/drift")] == [0, 3, 6]
