"""KappaTune in Lightning Fabric and in a loop of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from kappa_lightning import KappaProfile, evaluate_probe
from kappa_lightning.integrations import freeze
from kappa_lightning.probes import AccuracyProbe


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def test_fabric_trains_what_was_chosen_and_nothing_else():
    fabric = Fabric(accelerator="cpu", devices=1)
    module = net()
    inputs = torch.randn(16, 6)
    labels = module(inputs).argmax(-1)
    probe = AccuracyProbe([(inputs, labels)])
    assert evaluate_probe(module, probe) == 1.0
    frozen = freeze(module, top_p=0.4, always_train=["4.*"], progress=False)
    expected = KappaProfile.from_model(net(), include=["[02].weight"], progress=False).select(top_p=0.4)
    assert frozen.selected_names == expected
    assert frozen.trained_names == [*expected, "4.weight", "4.bias"]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(module.state_dict())
    wrapped, optimizer = fabric.setup(module, optimizer)
    for _ in range(3):
        fabric.backward(wrapped(torch.randn(8, 6)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(frozen.trained_names)
    assert evaluate_probe(module, probe) < 1.0


def test_single_experts_train_in_a_loop_of_ones_own():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(4, 5, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("eij,bj->bei", self.down_proj, x)

    module = Experts()
    before = module.down_proj.detach().clone()
    frozen = freeze(module, num_tensors=1, experts="each", progress=False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(torch.randn(2, 5)).square().sum().backward()
    optimizer.step()
    frozen.unfreeze()
    moved = [expert for expert in range(4) if not torch.equal(module.down_proj[expert], before[expert])]
    assert [f"down_proj[{expert}]" for expert in moved] == frozen.selected_names
    assert module.down_proj.requires_grad


def test_profile_of_another_model_is_refused_before_anything_changes():
    profile = KappaProfile.from_model(net(), progress=False)
    module = net()
    with torch.no_grad():
        module[0].weight.add_(1)
    with pytest.raises(ValueError, match=r"0\.weight"):
        freeze(module, top_p=0.5, profile=profile, progress=False)
    assert all(parameter.requires_grad for parameter in module.parameters())
