from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from families import data_of, fit, make
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from kappa_lightning import KappaFreezeCallback
from recipes.shared.memory import PeakMemory, SavedTensors
from recipes.shared.module import GenerativeModule


def saved(model, x):
    """Bytes that autograd keeps for the backward pass of a model."""
    counter = SavedTensors(model.parameters())
    with saved_tensors_hooks(counter.pack, counter.unpack):
        output = model(x)
    del output
    return counter.bytes


def chain():
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def test_frozen_prefix_keeps_no_activations():
    x, model = torch.randn(100, 64), chain()
    assert saved(model, x) == 4 * x.nbytes  # the input of each layer, for its weight's gradient
    model[:3].requires_grad_(False)
    assert saved(model, x) == x.nbytes
    model.requires_grad_(False)
    assert saved(model, x) == 0


def test_frozen_layer_behind_a_trained_one_keeps_no_input_of_its_own():
    x, model = torch.randn(100, 64), chain()
    model[1:].requires_grad_(False)
    # Its weight, which it needs for the gradient of its input, is there anyway.
    assert saved(model, x) == x.nbytes


class Chain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = chain()

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("trained", [None, 1])
def test_frozen_tensors_cost_no_gradient_and_no_optimizer_state(tmp_path, trained):
    module, memory = Chain(), PeakMemory()
    freeze = [] if trained is None else [KappaFreezeCallback(num_tensors=trained)]
    batch = torch.randn(10, 64)
    fit(tmp_path, module, DataLoader(batch, 10), *freeze, memory, max_epochs=1)
    weights = sum(p.nbytes for p in module.parameters())
    changing = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    steps = 4 * sum(p.requires_grad for p in module.parameters())  # AdamW counts them in one float32 a tensor
    assert memory.bytes == weights + 3 * changing + steps + memory.activations
    if trained is not None:
        assert changing == 64 * 64 * 4
        assert memory.activations < 4 * batch.nbytes


def test_freezing_a_vision_language_model_lets_go_of_activations(tmp_path, pictures):
    folder = str(make("llava", tmp_path))
    peaks = {}
    for towers in ("both", "language"):
        memory = PeakMemory()
        module = GenerativeModule(folder, towers=towers, max_new_tokens=3)
        fit(tmp_path, module, data_of(folder, pictures), memory, max_epochs=1)
        peaks[towers] = memory
    assert peaks["language"].activations < peaks["both"].activations
    assert peaks["language"].bytes < peaks["both"].bytes


def test_on_a_gpu_only_training_steps_count(monkeypatch):
    allocated = {"now": 0, "peak": 0}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=allocated["now"]))
    module, memory = SimpleNamespace(device=torch.device("cuda")), PeakMemory()
    memory.on_fit_start(None, module)
    for before, step in ((900, 50), (40, 70), (800, 60)):
        allocated["peak"] = before  # of a validation
        memory.on_train_batch_start(None, module, None, 0)
        allocated["peak"] = max(allocated["peak"], step)
        memory.on_train_batch_end(None, module, None, None, 0)
    memory.on_train_end(None, module)
    assert memory.bytes == 70
