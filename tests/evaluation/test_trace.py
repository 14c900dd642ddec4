"""Whatever a module keeps is as it was after an evaluation."""

from __future__ import annotations

import copy
import random
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import AccuracyProbe, ForgettingEval, Probe, evaluate_probe
from kappa_lightning.evaluation import undisturbed


class MergingLora(nn.Linear):
    """As loralib does it: the update is added to the weight in eval mode and taken out again in train mode."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__(width, width)
        self.weight.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, width))
        self.lora_b = nn.Parameter(torch.randn(width, rank))
        self.merged = False

    def train(self, mode: bool = True) -> MergingLora:
        super().train(mode)
        if mode == self.merged:
            update = self.lora_b @ self.lora_a
            self.weight.data += -update if mode else update
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.lora_a.T @ self.lora_b.T


def test_lora_that_merges_for_evaluation_trains_on_with_the_same_weights():
    model = nn.Sequential(MergingLora(5), nn.Dropout(), MergingLora(5))
    model[1].eval()  # the modes are mixed
    before = copy.deepcopy(model.state_dict())
    with undisturbed(model):
        assert model[0].merged
    assert not model[0].merged
    assert not model[2].merged
    assert [layer.training for layer in model] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(torch.randn(3, 5)).sum().backward()
    assert model[0].lora_a.grad is not None


def test_merged_lora_that_was_in_eval_mode_stays_merged():
    model = nn.Sequential(MergingLora(5), MergingLora(5))
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    with undisturbed(model):
        model.train()
    assert [layer.merged for layer in model] == [True, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_backbone_that_keeps_its_norms_in_eval_mode_gets_its_modes_back():
    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> Backbone:
            super().train(mode)
            self[1].eval()
            return self

    model = Backbone(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.train()
    model[1].train()  # by hand, against its own train()
    with undisturbed(model):
        pass
    assert model[1].training


class Everything(nn.Module):
    """Keeps state in all the places in which modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.average = torch.zeros(4)
        self.calls = 0
        self.outputs: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}
        self.names: set[str] = set()
        self.generator = torch.Generator().manual_seed(3)
        self.accuracy = torchmetrics.MeanMetric()
        self.hidden = [torchmetrics.MeanMetric()]

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.average += x.mean(0)
        self.calls += 1
        self.outputs.append(x)
        self.cache["last"] = x
        self.names.add("x")
        self.accuracy.update(x)
        self.hidden[0].update(x)
        self.register_buffer("late", x.clone())
        self.added = True
        noise = torch.randn(4, generator=self.generator)
        return self.norm.train()(self.layer(x) + noise)


def state_of(module: Everything) -> list[Any]:
    return [
        module.seen.clone(),
        module.average.clone(),
        torch.tensor(module.calls),
        torch.tensor(len(module.outputs)),
        torch.tensor(len(module.cache)),
        torch.tensor(len(module.names)),
        module.generator.get_state(),
        *(
            value.clone()
            for metric in (module.accuracy, *module.hidden)
            for value in (metric.mean_value, metric.weight)
        ),
        torch.tensor(module.accuracy._update_count),
        *(value.clone() for value in module.norm.buffers()),
        torch.tensor(hasattr(module, "late")),
        torch.tensor(hasattr(module, "added")),
        torch.get_rng_state(),
    ]


def test_everything_a_module_keeps_is_put_back():
    module = Everything()
    outputs = module.outputs
    module.accuracy.update(2.0)
    before = state_of(module)
    with undisturbed(module):
        for _ in range(2):
            module(torch.randn(6, 4))
        assert any(not torch.equal(a, b) for a, b in zip(before, state_of(module), strict=True))
    for number, (expected, found) in enumerate(zip(before, state_of(module), strict=True)):
        assert torch.equal(expected, found), number
    assert module.outputs is outputs


def test_everything_is_put_back_after_an_error():
    module = Everything()
    before = state_of(module)
    with pytest.raises(IndexError), undisturbed(module):
        (module(torch.randn(6, 4)), [][0])
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(module), strict=True))


@pytest.mark.parametrize("make", [spectral_norm, parametrizations.spectral_norm])
def test_vectors_of_spectral_norm_are_put_back(make):
    layer = make(nn.Linear(5, 4))
    layer(torch.randn(2, 5))
    before = copy.deepcopy(layer.state_dict())
    with undisturbed(layer):
        layer.train()(torch.randn(2, 5))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_requires_grad_and_gradients_are_put_back():
    layer = nn.Linear(3, 3)
    layer(torch.randn(2, 3)).sum().backward()
    gradient, values = layer.weight.grad, layer.weight.grad.clone()
    layer.bias.requires_grad_(False)
    with undisturbed(layer), torch.enable_grad():
        layer.bias.requires_grad_(True)
        layer.zero_grad()
        layer(torch.randn(2, 3)).sum().backward()
    assert layer.weight.grad is gradient
    assert torch.equal(gradient, values)
    assert not layer.bias.requires_grad


def test_step_that_changes_a_weight_is_an_error_that_names_it():
    model = nn.Sequential(nn.Linear(3, 3))

    def step(module: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        module[0].weight.mul_(2)
        return module(batch[0]), batch[1]

    probe = Probe(
        [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))], torchmetrics.Accuracy("multiclass", num_classes=3), step
    )
    with pytest.raises(RuntimeError, match=r"0\.weight in place"):
        evaluate_probe(model, probe)


def test_settings_of_a_configuration_are_put_back():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    with undisturbed(model):
        model.generation_config.max_new_tokens = 77
        model.config.use_cache = not model.config.use_cache
        inside = model.config.use_cache
    assert model.generation_config.max_new_tokens != 77
    assert model.config.use_cache != inside


class Shared(pl.LightningModule):
    """Trains and validates with one step, which logs and feeds the module's own metric."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def shared_step(self, batch: list[Tensor], stage: str) -> Tensor:
        x, y = batch
        logits = self.layer(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log(f"{stage}_loss", loss)
        self.log_dict({f"{stage}_accuracy": self.accuracy}, on_epoch=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.shared_step(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.shared_step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks: pl.Callback) -> dict[str, Tensor]:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        max_epochs=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Shared(), DataLoader(data, 8), DataLoader(data, 8))
    return {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("forgetting")}


def test_probe_that_calls_the_shared_step_leaves_the_figures_of_the_run_alone():
    batches = [(torch.full((4, 4), 9.0), torch.zeros(4, dtype=torch.long))]

    def step(module: Shared, batch: list[Tensor]) -> Tensor:
        module.shared_step(batch, "val")
        return torch.ones(())  # since a baseline of zero would be refused

    class Mean(torchmetrics.MeanMetric):
        higher_is_better = True

    alone, evaluated = fit(), fit(ForgettingEval({"old": Probe(batches, Mean(), step)}))
    assert alone.keys() == evaluated.keys()
    assert all(torch.equal(alone[name], evaluated[name]) for name in alone)


def test_evaluation_outside_of_a_fit_gives_the_metric_and_leaves_the_module_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    inputs = torch.randn(16, 4)
    model.eval()
    labels = model(inputs).argmax(-1)
    labels[:4] = (labels[:4] + 1) % 3
    model.train()
    state = torch.get_rng_state()
    assert evaluate_probe(model, AccuracyProbe([(inputs, labels)])) == 0.75
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


class Meter:
    """A running mean, as training scripts have it."""

    def __init__(self) -> None:
        self.total, self.values = 0.0, [torch.zeros(1)]

    def update(self, value: float) -> None:
        self.total += value
        self.values[0] += value
        self.values.append(torch.ones(1))


def test_objects_that_a_module_keeps_beside_tensors_are_put_back():
    net = nn.Linear(2, 2)
    net.meter, net.meters = Meter(), {"val": Meter()}
    net.recent, net.pair = deque([1, 2], maxlen=3), (torch.zeros(2), [1])
    net.array, net.namespace = np.zeros(2), SimpleNamespace(count=0)
    net.meter.owner = net  # a circle
    draws = (np.random.default_rng(1), np.random.RandomState(1), random.Random(1))
    net.numpy, net.older, net.python = draws

    def found() -> str:
        meters = [(meter.total, meter.values) for meter in (net.meter, net.meters["val"])]
        states = (net.numpy.bit_generator.state, net.older.get_state(), net.python.getstate())
        return repr((meters, net.recent, net.pair, net.array, net.namespace, states))

    before = found()
    with undisturbed(net):
        net.meter.update(2.0)
        net.meters["val"].update(3.0)
        net.recent.extend([3, 4])
        net.pair[0].add_(1)
        net.pair[1].append(2)
        net.array += 1
        net.namespace.count = 1
        for generator in draws:
            generator.random()
        net.older.random_sample(700)
        assert found() != before
    assert found() == before
    assert net.recent.maxlen == 3


def test_trainer_of_a_module_goes_on_where_it_is():
    net = pl.LightningModule()
    net.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    with undisturbed(net):
        net.trainer.should_stop = True
    assert net.trainer.should_stop


def test_object_that_works_beside_the_run_goes_on():
    net = nn.Linear(2, 2)
    net.writer = Meter()
    net.writer.lock = threading.Lock()
    with undisturbed(net):
        net.writer.update(1.0)
    assert net.writer.total == 1.0
