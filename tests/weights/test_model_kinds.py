"""Models that other code has wrapped: compiled, parametrized, with adapters of PEFT, with fused experts."""

import statistics

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import KappaFreezeCallback, KappaProfile
from kappa_lightning.weights import find_weights


class Net(pl.LightningModule):
    """Layers side by side, each of which gets a gradient in each step."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return sum((layer(x) - 1).square().mean() for layer in self.children())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root, module, callback, **options):
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root, callbacks=[callback],
    )  # fmt: skip
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=4), **options)
    return trainer


def linear(kappa, seed=0):
    """A 6 × 6 layer of a chosen condition number."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.standard_normal((6, 6)))[0] for _ in range(2))
    layer = nn.Linear(6, 6)
    layer.weight.data = torch.tensor(left @ np.diag(np.geomspace(kappa, 1.0, 6)) @ right, dtype=torch.float32)
    return layer


def profile_of(module, **options):
    return KappaProfile.from_model(module, progress=False, **options)


def numpy_kappa(matrix):
    sigma = np.linalg.svd(matrix.detach().double().flatten(1).numpy(), compute_uv=False)
    return sigma[0] / sigma[-1]


def names_of(module):
    return [row.name for row in profile_of(module)]


# Compiled


def test_compiled_part_has_the_profile_of_the_plain_model():
    plain = Net(body=nn.Sequential(linear(3.0, 1), linear(5.0, 2)), head=linear(2.0, 3))
    expected = profile_of(plain)
    plain.body = torch.compile(plain.body, backend="eager")
    assert next(name for name, _ in plain.named_parameters()) == "body._orig_mod.0.weight"
    assert profile_of(plain) == expected
    assert [row.name for row in expected] == ["body.0.weight", "body.1.weight", "head.weight"]
    expected.check(plain)


def test_compiled_model_has_the_profile_of_the_plain_one():
    plain = Net(body=linear(3.0), head=linear(2.0))
    compiled = torch.compile(plain, backend="eager")
    assert profile_of(compiled) == profile_of(plain)
    profile_of(plain).check(compiled)


def test_patterns_match_the_plain_names_of_a_compiled_part():
    net = Net(body=torch.compile(nn.Sequential(linear(3.0)), backend="eager"), head=linear(2.0))
    assert [row.name for row in profile_of(net, include=["body.0.*"])] == ["body.0.weight"]
    with pytest.raises(ValueError, match=r"_orig_mod"):
        profile_of(net, include=["body._orig_mod.*"])


def test_compiled_part_trains_and_freezes_under_its_plain_names(tmp_path):
    net = Net(low=torch.compile(linear(2.0), backend="eager"), high=torch.compile(linear(9.0), backend="eager"))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    callback = KappaFreezeCallback(num_tensors=1, include=["*.weight"], always_train=["low.bias"])
    fit(tmp_path, net, callback)
    assert callback.trained_names == ["low.weight", "low.bias"]
    assert callback.frozen_names == ["high.weight", "high.bias"]
    moved = [name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["low._orig_mod.weight", "low._orig_mod.bias"]


def test_compiled_lightning_module_trains_and_freezes_under_its_plain_names(tmp_path):
    net = Net(low=linear(2.0), high=linear(9.0))
    callback = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, torch.compile(net, backend="eager"), callback)
    assert callback.trained_names == ["low.weight"]
    assert callback.frozen_names == ["low.bias", "high.weight", "high.bias"]
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == ["low.weight"]


# Parametrized


class Symmetric(nn.Module):
    """A = X + Xᵀ."""

    def forward(self, x):
        return x + x.T


class Stretched(nn.Module):
    """Rows times learned numbers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 20, 6).unsqueeze(1))

    def forward(self, x):
        return x * self.scale


class Product(nn.Module):
    """A = L R, of two originals whose shapes are not that of A."""

    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        return weight @ torch.randn(6, 9), torch.randn(9, 6)


def parametrized(kind, kappa=4.0, seed=0):
    layer = linear(kappa, seed)
    if kind == "weight_norm":
        weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(torch.linspace(1, 20, 6).unsqueeze(1))
    elif kind == "spectral_norm":
        spectral_norm(layer)
    elif kind == "orthogonal":
        orthogonal(layer)
    else:
        module = {"symmetric": Symmetric, "stretched": Stretched, "product": Product}[kind]()
        parametrize.register_parametrization(layer, "weight", module)
    return layer


KINDS = ["weight_norm", "spectral_norm", "orthogonal", "symmetric", "stretched", "product"]


@pytest.mark.parametrize("kind", KINDS)
def test_kappa_is_that_of_the_weight_the_layer_uses(kind):
    net = nn.ModuleDict({"layer": parametrized(kind)})
    profile = profile_of(net, rtol=1e-6)
    net.eval()
    used = net["layer"](torch.eye(6)) - net["layer"].bias
    (row,) = (row for row in profile if row.name.startswith("layer.parametrizations.weight.original"))
    assert row.kappa == pytest.approx(numpy_kappa(used), rel=1e-4)
    assert row.shape == (6, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_row_goes_by_the_name_of_a_parameter(kind, compiled):
    net = nn.ModuleDict({"layer": parametrized(kind)})
    names = [name for name, _ in net.named_parameters()]
    if compiled:
        net["layer"] = torch.compile(net["layer"], backend="eager")
    found = names_of(net)
    assert set(found) <= set(names)
    assert len([name for name in found if ".original" in name]) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_reading_changes_no_parameter_no_buffer_and_no_mode(kind, training):
    net = nn.ModuleDict({"layer": parametrized(kind), "plain": linear(3.0)}).train(training)
    net["plain"].train(not training)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    first = profile_of(net)
    first.check(net)
    assert profile_of(net) == first
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_modes_are_put_back_if_the_parametrization_fails():
    class Broken(Symmetric):
        broken = False

        def forward(self, x):
            if self.broken:
                raise RuntimeError("no weight today")
            return super().forward(x)

    layer = linear(3.0)
    parametrize.register_parametrization(layer, "weight", Broken())
    layer.train()
    layer.parametrizations.weight[0].broken = True
    with pytest.raises(RuntimeError, match=r"no weight today"):
        profile_of(layer)
    assert all(module.training for module in layer.modules())


def test_convolution_is_read_by_its_output_channels_under_a_parametrization():
    layer = weight_norm(nn.Conv1d(4, 5, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0[0] *= 30
    (row,) = profile_of(layer, rtol=1e-6)
    assert row.kappa == pytest.approx(numpy_kappa(layer.weight), rel=1e-5)
    assert row.kappas is None


def test_parametrized_bias_is_a_vector():
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "bias", nn.Tanh(), unsafe=True)
    assert names_of(layer) == ["weight"]


def test_weight_norm_of_the_old_style_is_read_as_the_layer_uses_it():
    with pytest.warns(FutureWarning, match=r"weight_norm"):
        layer = nn.utils.weight_norm(linear(3.0))
    with torch.no_grad():
        layer.weight_g.mul_(torch.linspace(1, 20, 6).unsqueeze(1))
    used = layer(torch.eye(6)) - layer.bias
    (row,) = profile_of(layer)
    assert row.kappa == pytest.approx(numpy_kappa(used), rel=2e-3)


def originals(module, layer):
    prefix = f"{layer}.parametrizations.weight."
    return [name for name, _ in module.named_parameters() if name.startswith(prefix)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_a_selected_weight_is_made_from_trains(kind, tmp_path):
    net = Net(low=parametrized(kind), high=linear(1e5))
    callback = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, net, callback)
    assert callback.trained_names == originals(net, "low")
    assert callback.frozen_names == [name for name, _ in net.named_parameters() if name not in originals(net, "low")]


@pytest.mark.parametrize("train_vectors", [False, True])
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "symmetric", "product", "stretched"])
def test_weight_that_is_not_selected_is_bit_identical_after_training(kind, train_vectors, tmp_path):
    net = Net(high=parametrized(kind), low=linear(1.0))
    with torch.no_grad():
        net.low.weight.copy_(torch.eye(6))
    before = net.high.weight.detach().clone()
    callback = KappaFreezeCallback(num_tensors=1, train_vectors=train_vectors, exclude=["high.*"])
    fit(tmp_path, net, callback)
    assert not torch.equal(net.low.weight, torch.eye(6))
    assert torch.equal(net.high.weight, before)


def test_training_of_a_parametrized_weight_goes_on_from_a_checkpoint(tmp_path):
    def make():
        torch.manual_seed(5)
        return Net(low=parametrized("product"), high=linear(1e5))

    callback = KappaFreezeCallback(num_tensors=1)
    trainer = fit(tmp_path, make(), callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, make(), resumed, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.trained_names == callback.trained_names


def test_meta_parametrized_weight_is_an_error_that_names_it():
    layer = weight_norm(nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match=r"parametrizations\.weight\.original1 is on the meta device"):
        profile_of(layer)


# PEFT


@pytest.fixture
def adapted():
    """A bare model, and its twin with LoRA adapters on two of the three layers."""
    peft = pytest.importorskip("peft")
    bare, twin = (nn.Sequential(linear(3.0, 1), nn.Tanh(), linear(7.0, 2), linear(5.0, 3)) for _ in range(2))
    return bare, peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules=["0", "2"]))


def test_base_layers_under_adapters_have_the_rows_of_the_bare_model(adapted):
    bare, wrapped = adapted
    expected = profile_of(bare)
    profile = profile_of(wrapped, exclude=["*lora_*"])
    by_bare_name = {
        row.name.removeprefix("base_model.model.").replace(".base_layer", ""): (row.kappa, row.fingerprint, row.shape)
        for row in profile
    }
    assert by_bare_name == {row.name: (row.kappa, row.fingerprint, row.shape) for row in expected}
    assert "base_model.model.0.base_layer.weight" in profile
    profile.check(wrapped)


def test_adapters_are_matrices_of_their_own(adapted):
    _, wrapped = adapted
    profile = profile_of(wrapped, include=["*lora_A*"])
    assert [row.name for row in profile] == [
        "base_model.model.0.lora_A.default.weight",
        "base_model.model.2.lora_A.default.weight",
    ]
    for row in profile:
        assert row.kappa == pytest.approx(numpy_kappa(dict(wrapped.named_parameters())[row.name]), rel=2e-3)


def test_freeze_leaves_the_base_that_peft_froze_frozen(adapted, tmp_path):
    _, wrapped = adapted
    net = Net(model=wrapped)
    callback = KappaFreezeCallback(top_p=1.0, include=["*lora_A*"])
    fit(tmp_path, net, callback)
    assert len(callback.trained_names) == 2
    assert all("lora_A" in name for name in callback.trained_names)
    assert not any(parameter.requires_grad for name, parameter in net.named_parameters() if "base_layer" in name)


# Fused experts


def experts(*kappas):
    """A stack of 6 × 6 matrices of chosen condition numbers; ∞ makes one of rank five."""
    matrices = []
    for seed, kappa in enumerate(kappas):
        weight = linear(min(kappa, 2.0), seed).weight.detach() if kappa == np.inf else linear(kappa, seed).weight
        weight = weight.detach().clone()
        if kappa == np.inf:
            weight[0] = weight[1]
        matrices.append(weight)
    return nn.Parameter(torch.stack(matrices))


COMBINED = {"mean": statistics.fmean, "median": statistics.median, "max": max}


@pytest.mark.parametrize("how", COMBINED)
@pytest.mark.parametrize("kappas", [(2.0, 30.0, 7.0), (2.0, 30.0, 7.0, 4.0), (3.0, 3.0)])
def test_kappas_of_experts_combine_as_asked(how, kappas):
    net = nn.ParameterDict({"experts": experts(*kappas)})
    row = profile_of(net, experts=how)["experts"]
    np.testing.assert_allclose(row.kappas, kappas, rtol=1e-3)
    assert row.kappa == pytest.approx(COMBINED[how](kappas), rel=1e-3)


@pytest.mark.parametrize(("how", "expected"), [("mean", np.inf), ("median", 7.0), ("max", np.inf)])
def test_one_degenerate_expert_counts_as_the_combination_says(how, expected):
    net = nn.ParameterDict({"experts": experts(2.0, np.inf, 7.0)})
    profile = profile_of(net, experts=how)
    assert profile["experts"].kappas[1] == np.inf
    assert profile["experts"].kappa == pytest.approx(expected, rel=1e-3)
    assert profile["experts"].sigma_min == 0.0
    assert profile.experts == how


def test_row_gives_the_spectrum_of_each_expert_and_of_a_kernel_as_a_matrix():
    stack = torch.randn(3, 4, 6)
    net = nn.ModuleDict({"experts": nn.ParameterList([stack]), "conv": nn.Conv2d(2, 5, 3)})
    profile = profile_of(net, experts="median")
    rows = [profile["experts.0"], profile["conv.weight"]]
    for row, matrices in zip(rows, (stack, net["conv"].weight.detach().flatten(1)[None]), strict=True):
        assert [matrix.shape for matrix in row.matrices] == [tuple(matrices.shape[1:])] * len(matrices)
        for found, matrix in zip(row.matrices, matrices, strict=True):
            sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
            reference = (sigma[0] / sigma[-1], sigma[0], np.log(sigma).sum(), np.sqrt((sigma**2).sum()))
            figures = (found.kappa, found.sigma_max, found.log_volume, found.frobenius_norm)
            np.testing.assert_allclose(figures, reference, rtol=1e-3)
        assert row.kappa == row.combine(matrix.kappa for matrix in row.matrices)
    assert profile["experts.0"].combine([5.0, 1.0, 2.0]) == 2.0


def test_median_of_two_experts_of_which_one_is_degenerate_is_infinite():
    net = nn.ParameterDict({"experts": experts(2.0, np.inf)})
    assert profile_of(net, experts="median")["experts"].kappa == np.inf


def test_combination_is_nothing_to_a_tensor_of_one_matrix():
    net = nn.Linear(6, 4)
    kappas = {how: profile_of(net, experts=how)["weight"].kappa for how in COMBINED}
    assert len(set(kappas.values())) == 1


def test_unknown_combination_is_an_error_that_tells_the_known_ones(tmp_path):
    for make in (lambda: profile_of(nn.Linear(3, 3), experts="min"), lambda: KappaFreezeCallback(experts="min")):
        with pytest.raises(ValueError, match=r"experts='min'.*'mean', 'median', 'max'"):
            make()


class Bank(nn.Module):
    def __init__(self, *kappas):
        super().__init__()
        self.up = experts(*kappas)

    def forward(self, x):
        return (x @ self.up).sum(0)


@pytest.mark.parametrize(("how", "trained"), [("mean", "plain.weight"), ("median", "bank.up"), ("max", "plain.weight")])
def test_freeze_ranks_experts_by_their_combined_kappa(how, trained, tmp_path):
    # Of the experts' κ, 2, ∞ and 3, only the median is below the plain layer's 5.
    net = Net(bank=Bank(2.0, np.inf, 3.0), plain=linear(5.0))
    callback = KappaFreezeCallback(num_tensors=1, experts=how)
    fit(tmp_path, net, callback)
    assert callback.trained_names == [trained]
    assert callback.profile.experts == how


def test_weights_of_every_kind_are_found_in_one_model():
    net = nn.ModuleDict(
        {
            "compiled": torch.compile(nn.Linear(3, 3), backend="eager"),
            "normed": weight_norm(nn.Linear(3, 3)),
            "bank": Bank(2.0, 3.0),
        }
    )
    assert [(weight.name, weight.is_stack) for weight in find_weights(net)] == [
        ("compiled.weight", False),
        ("normed.parametrizations.weight.original1", False),
        ("bank.up", True),
    ]
