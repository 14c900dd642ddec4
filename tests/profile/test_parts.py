"""A profile with a row for each expert or head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kappa_lightning import KappaProfile


class Layer(nn.Module):
    """A dense projection beside fused experts of known κ."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 4))


@pytest.fixture
def layer() -> Layer:
    return Layer()


def kappa_of(matrix: torch.Tensor) -> float:
    values = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
    return float(values[0] / values[-1])


def test_each_expert_has_a_row_with_its_own_figures(layer):
    profile = KappaProfile.from_model(layer, experts="each", progress=False)
    names = [f"{name}[{expert}]" for name in ("gate_up_proj", "down_proj") for expert in range(3)]
    assert {row.name for row in profile} == {"dense.weight", *names}
    for expert in range(3):
        row = profile[f"down_proj[{expert}]"]
        assert row.shape == (5, 4)
        assert row.num_parameters == 20
        assert row.kappas is None
        assert row.kappa == pytest.approx(kappa_of(layer.down_proj[expert]), rel=1e-3)


def test_gate_and_up_apart_have_the_kappa_of_their_halves(layer):
    profile = KappaProfile.from_model(layer, experts="each", gate_up="apart", progress=False)
    assert profile["gate_up_proj[1:up]"].kappa == pytest.approx(kappa_of(layer.gate_up_proj[1, 4:]), rel=1e-3)
    assert profile["gate_up_proj[1:gate]"].kappa == pytest.approx(kappa_of(layer.gate_up_proj[1, :4]), rel=1e-3)


def test_budgets_count_experts(layer):
    profile = KappaProfile.from_model(layer, include=["*_proj"], experts="each", progress=False)
    by_kappa = [row.name for row in sorted(profile, key=lambda row: (row.kappa, row.name))]
    assert profile.select(num_tensors=2) == by_kappa[:2]
    assert profile.select(top_p=0.5) == by_kappa[:3]


def test_profile_of_experts_survives_a_file_and_knows_its_model(layer, tmp_path):
    profile = KappaProfile.from_model(layer, experts="each", gate_up="apart", progress=False)
    profile.save(tmp_path / "profile.json")
    loaded = KappaProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    loaded.check(layer)
    with torch.no_grad():
        layer.gate_up_proj[2, 5] += 1
    with pytest.raises(ValueError, match=r"gate_up_proj\[2:up\]"):
        loaded.check(layer)


def test_experts_of_a_checkpoint_have_the_rows_of_the_model(layer, tmp_path):
    save_file({name: value.contiguous() for name, value in layer.state_dict().items()}, tmp_path / "model.safetensors")
    profile = KappaProfile.from_checkpoint(tmp_path / "model.safetensors", experts="each", progress=False)
    profile.check(layer)
    assert profile["down_proj[2]"].kappa == pytest.approx(kappa_of(layer.down_proj[2]), rel=1e-3)


def test_each_head_has_a_row():
    attention = nn.MultiheadAttention(8, 2)
    profile = KappaProfile.from_model(attention, heads="each", progress=False)
    row = profile["in_proj_weight[k head 1]"]
    assert row.kappa == pytest.approx(kappa_of(attention.in_proj_weight[12:16]), rel=1e-3)
    assert profile["out_proj.weight[head 0]"].shape == (8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": "all"}, "experts='all' is unknown.*'each'"),
        ({"heads": "every"}, "heads='every' is unknown"),
        ({"gate_up": "apart"}, 'needs experts="each"'),
    ],
)
def test_unknown_choice_names_what_there_is(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        KappaProfile.from_model(layer, progress=False, **arguments)


def test_heads_of_a_checkpoint_are_refused(layer, tmp_path):
    save_file({name: value.contiguous() for name, value in layer.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="needs the model"):
        KappaProfile.from_checkpoint(tmp_path / "model.safetensors", heads="each", progress=False)
