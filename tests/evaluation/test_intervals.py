"""Items of an evaluation and the interval of the retention, against direct resampling in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryF1Score, MulticlassAUROC

from kappa_lightning import AccuracyProbe, PerplexityProbe, Probe, SimilarityProbe
from kappa_lightning.evaluation import Circumstances, Items, measure_probe, retention_interval

COUNT = 60


def _numbers(seed: int) -> Tensor:
    return torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(seed))


def _measure(probe: Probe, module: nn.Module | None = None) -> Any:
    return measure_probe(module or nn.Identity(), probe, Circumstances())


def _accuracy(correct: Tensor, batch_size: int = 7) -> Probe:
    """Of an identity: the logits are the samples, of which as many have their label as wanted."""
    data = TensorDataset(torch.eye(2)[(~correct).long()], torch.zeros(len(correct), dtype=torch.long))
    return AccuracyProbe(DataLoader(data, batch_size=batch_size))


class _Scaled(nn.Module):
    """Gives the logits of its table for a sample's number."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.table[numbers]


def _table_probe(kind: str, batch_size: int, shuffle: bool = False) -> Probe:
    labels = torch.arange(COUNT) % 3
    data = DataLoader(TensorDataset(torch.arange(COUNT), labels), batch_size=batch_size, shuffle=shuffle)
    if kind == "accuracy":
        return AccuracyProbe(data)
    if kind == "f1":
        f1 = BinaryF1Score()
        return Probe(data, f1, lambda module, batch: (module(batch[0])[:, 0].sigmoid(), (batch[1] == 0).long()))
    return Probe(data, MulticlassAUROC(3), lambda module, batch: (module(batch[0]), batch[1]))


def test_interval_of_an_accuracy_is_that_of_a_paired_bootstrap_in_numpy() -> None:
    labels = torch.arange(COUNT) % 3
    tables = [_numbers(1) + 2 * torch.eye(3)[labels], _numbers(2) + torch.eye(3)[labels]]
    probe = _table_probe("accuracy", 7)
    before, now = (_measure(probe, _Scaled(table)).items for table in tables)
    low, high = retention_interval(probe.metric, before, now, resamples=4000)
    correct = [(table.argmax(-1) == labels).numpy() for table in tables]
    random = np.random.default_rng(9)
    draws = random.integers(COUNT, size=(20000, COUNT))
    expected = np.quantile(correct[1][draws].mean(1) / correct[0][draws].mean(1), [0.025, 0.975])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.03)
    assert low < correct[1].mean() / correct[0].mean() < high


def test_pairing_tells_that_nothing_changed_where_two_samples_alone_would_not() -> None:
    probe = _table_probe("accuracy", 7)
    items = _measure(probe, _Scaled(_numbers(1))).items
    assert retention_interval(probe.metric, items, items) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["accuracy", "f1", "auroc"])
def test_items_are_samples_whatever_the_batches_of_sums_and_lists(kind: str) -> None:
    measured = [_measure(_table_probe(kind, size), _Scaled(_numbers(1))) for size in (7, COUNT)]
    assert [len(m.items) for m in measured] == [COUNT, COUNT]
    assert measured[0].value == pytest.approx(measured[1].value)
    interval = retention_interval(_table_probe(kind, 7).metric, measured[0].items, measured[0].items, resamples=50)
    assert interval == pytest.approx((1.0, 1.0))


def test_interval_of_a_metric_of_lists_surrounds_the_retention() -> None:
    labels = torch.arange(COUNT) % 3
    probe = _table_probe("auroc", 7)
    before = _measure(probe, _Scaled(_numbers(1) + 2 * torch.eye(3)[labels]))
    now = _measure(probe, _Scaled(_numbers(2) + 0.5 * torch.eye(3)[labels]))
    low, high = retention_interval(probe.metric, before.items, now.items, resamples=200)
    assert low < now.value / before.value < high < 1


def test_sequences_are_the_items_of_a_perplexity() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(n))} for n in range(3)]
    probe = PerplexityProbe(batches, logits=lambda module, batch: table[batch["input_ids"]])
    measured = _measure(probe)
    assert len(measured.items) == 12
    nats = measured.items.states["nats"].sum() / measured.items.states["tokens"].sum()
    assert math.exp(nats) == pytest.approx(measured.value, rel=1e-9)


def test_a_metric_that_is_no_sum_over_samples_has_batches_as_items() -> None:
    class MeanOfMeans(MeanMetric):
        higher_is_better = True

        def update(self, value: Tensor) -> None:
            super().update(value.max())

    probe = Probe([torch.rand(4) for _ in range(5)], MeanOfMeans(), lambda module, batch: batch)
    assert len(_measure(probe).items) == 5


def test_other_batches_than_before_have_no_interval() -> None:
    probe = _accuracy(torch.arange(COUNT) % 2 == 0)
    items = _measure(probe).items
    other = Items([f"{key}x" for key in items.keys], items.states)
    assert retention_interval(probe.metric, items, other) is None
    one = Items(items.keys[:1], {name: value[:1] for name, value in items.states.items()})
    assert retention_interval(probe.metric, one, one) is None


def test_shuffled_batches_of_the_same_content_are_paired() -> None:
    batches = [(torch.eye(2)[[k % 2, 1]], torch.tensor([0, 1])) for k in range(6)]
    one, other = (_measure(AccuracyProbe(order)).items for order in (batches, batches[::-1]))
    assert one.keys == other.keys
    assert all(torch.equal(one.states[name], other.states[name]) for name in one.states)


def test_similarity_has_pairs_as_items() -> None:
    first, second = _numbers(1), _numbers(2)
    batches = [(first[k : k + 6], second[k : k + 6], torch.arange(k, k + 6.0)) for k in range(0, 24, 6)]
    assert len(_measure(SimilarityProbe(batches, lambda module, x: x)).items) == 24
