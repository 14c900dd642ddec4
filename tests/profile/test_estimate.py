"""What a profile and a fine-tuning will take, before either."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kappa_lightning.cli import main
from kappa_lightning.profile.estimate import Estimate, ShapeEstimate, estimate_profile
from kappa_lightning.spectra import working_bytes
from kappa_lightning.weights import find_weights


def two_shapes() -> Estimate:
    """Three tensors of 4 matrices that take 2 s each, and two single matrices of 3 s."""
    experts = ShapeEstimate((8, 4), torch.bfloat16, tensors=3, count=12, seconds=2.0, working_bytes=100)
    single = ShapeEstimate((16, 16), torch.float32, tensors=2, count=2, seconds=3.0, working_bytes=5000)
    return Estimate((experts, single), ((4, 0), (4, 0), (4, 0), (1, 1), (1, 1)))


def test_work_is_shared_by_whole_tensors_the_expensive_ones_first():
    estimate = two_shapes()
    assert estimate.seconds() == 3 * 8.0 + 2 * 3.0
    assert estimate.seconds(2) == 16.0  # 8 + 8 on one, 8 + 3 + 3 on the other
    assert estimate.seconds(50) == 8.0
    with pytest.raises(ValueError, match="devices=0"):
        estimate.seconds(0)


def test_memory_is_counted_in_the_stored_precision():
    estimate = two_shapes()
    assert estimate.parameters == 12 * 32 + 2 * 256
    assert estimate.stored_bytes == 12 * 32 * 2 + 2 * 256 * 4
    assert estimate.peak_bytes() == 256 * 4 + 5000
    stored = estimate.stored_bytes
    expected = {"weights": stored, "gradients": stored / 4, "Adam": stored / 2, "anchor": stored / 4}
    assert estimate.training_bytes(0.25) == {**expected, "sensitivity": stored}


def test_model_without_values_is_estimated_and_random_numbers_are_left_alone():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Conv2d(3, 8, 3))
    state = torch.get_rng_state()
    estimate = estimate_profile(find_weights(net))
    assert torch.equal(torch.get_rng_state(), state)
    assert {(each.shape, each.count, each.tensors) for each in estimate.shapes} == {((24, 24), 2, 2), ((8, 27), 1, 1)}
    by_shape = {each.shape: each for each in estimate.shapes}
    assert by_shape[24, 24].working_bytes == working_bytes(24, 24)
    assert all(each.seconds > 0 for each in estimate.shapes)
    assert len(estimate.tensors) == 3


def test_scan_with_plan_reads_no_weight(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_file({"experts": torch.full((3, 6, 4), float("nan")), "head.weight": torch.ones(5, 4)}, file)
    # The entries are NaN, at which a scan stops.
    assert main(["scan", str(file), "--plan", "--devices", "2"]) == 0
    output = capsys.readouterr().out
    assert "2 tensors of 92 parameters" in output
    assert "6×4" in output
    assert "on 2" in output
    assert main(["scan", str(file)]) == 1
    assert main(["scan", str(file), "--plan", "--devices", "0"]) == 1
    assert "--devices 0" in capsys.readouterr().err
