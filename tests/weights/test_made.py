"""Weights that a layer makes from other parameters are read as its forward uses them."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, TensorDataset
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.wav2vec2.modeling_wav2vec2 import AMSoftmaxLoss

from kappa_lightning import KappaFreezeCallback, KappaMonitor, KappaProfile
from kappa_lightning.weights import find_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def only(module):
    (weight,) = find_weights(module)
    return weight


def rows_out(layer, inputs):
    """The (out, in·k…) matrix of a layer, seen from outside: what it makes of single entries of a patch."""
    size = getattr(layer, "kernel_size", ())
    basis = torch.eye(inputs * int(np.prod(size))).reshape(-1, inputs, *size)
    with torch.no_grad():
        return layer(basis).flatten(1).T


def kappa(matrix):
    sigma = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
    return sigma[0] / sigma[-1]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_older_spectral_norm_of_a_transposed_convolution_is_read_in_its_orientation(kind, groups):
    layer = nn.utils.spectral_norm(kind(8, 4, 3, groups=groups))
    plain = kind(8, 4, 3, groups=groups)
    plain.weight.data = layer.weight_orig.data.clone()
    weight, expected = only(layer), only(plain)
    assert weight.name == "weight_orig"
    assert weight.stack_shape == expected.stack_shape == (1, 4, 8 // groups * 3 ** len(plain.kernel_size))
    layer.eval()
    layer(torch.zeros(1, 8, *(5 for _ in plain.kernel_size)))  # sets layer.weight
    plain.weight.data = layer.weight.data.clone()
    torch.testing.assert_close(weight.matrices(), expected.matrices())


@pytest.mark.parametrize("training", [False, True])
def test_older_spectral_norm_is_read_without_a_power_iteration(training):
    layer = nn.utils.spectral_norm(nn.Conv1d(3, 4, 2, bias=False)).train(training)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found = only(layer).matrices()[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    torch.testing.assert_close(found, rows_out(layer.eval(), 3))


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(3, 4, 2, bias=False), nn.Linear(5, 3, bias=False), nn.Conv2d(2, 3, 2, bias=False)], ids=str
)
def test_older_weight_norm_is_read_with_its_lengths(layer):
    inputs = layer.weight.shape[1]
    nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(torch.logspace(0, 2, layer.weight_g.numel()).view_as(layer.weight_g))
    weight = only(layer)
    assert weight.name == "weight_v"
    assert weight.companions == ("weight_g",)
    torch.testing.assert_close(weight.matrices()[0], rows_out(layer, inputs))


def test_older_weight_norm_of_a_transposed_convolution_keeps_its_orientation():
    layer = nn.utils.weight_norm(nn.ConvTranspose1d(8, 4, 3))
    with torch.no_grad():
        layer.weight_g.mul_(torch.logspace(0, 1, 8).view_as(layer.weight_g))
    layer(torch.zeros(1, 8, 4))
    (row,) = KappaProfile.from_model(layer, progress=False)
    assert row.matrix_shape == (4, 24)
    assert row.kappa == pytest.approx(kappa(layer.weight.transpose(0, 1).flatten(1)), rel=2e-3)


def test_older_weight_norm_of_a_recurrent_weight():
    layer = nn.utils.weight_norm(nn.LSTM(1, 3), "weight_ih_l0")
    found = {weight.name: weight.stack_shape for weight in find_weights(layer)}
    assert found["weight_ih_l0_v"] == (1, 12, 1)
    assert "weight_ih_l0_g" not in found


@pytest.mark.parametrize("twice", [False, True])
def test_pruned_layer_is_read_with_its_mask(twice):
    layer = nn.Linear(6, 4, bias=False)
    prune.l1_unstructured(layer, "weight", amount=8)
    if twice:
        prune.random_unstructured(layer, "weight", amount=4)
    weight = only(layer)
    assert weight.name == "weight_orig"
    assert int((weight.read() == 0).sum()) == (12 if twice else 8)
    assert torch.equal(weight.matrices()[0], rows_out(layer, 6))


def test_standardized_convolution_is_read_as_its_forward_standardizes_it():
    layer = WeightStandardizedConv2d(3, 5, 2, padding=0)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(0, 2, 5).view(-1, 1, 1, 1)).add_(3)
    weight = only(layer)
    assert weight.name == "weight"
    torch.testing.assert_close(weight.matrices()[0], rows_out(layer, 3), rtol=1e-4, atol=1e-5)


def test_cosine_classifier_is_read_with_its_columns_normalized():
    layer = AMSoftmaxLoss(5, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 10.0, 100.0]))
    (row,) = KappaProfile.from_model(layer, progress=False)
    assert row.kappa == pytest.approx(kappa(layer.weight / layer.weight.norm(dim=0)), rel=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layer_that_trains_for_quantization_is_read_rounded_and_its_ranges_do_not_move():
    qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    layer = torch.ao.nn.qat.Linear(6, 4, bias=False, qconfig=qconfig)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found = only(layer).matrices()[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not torch.equal(found, layer.weight)
    torch.testing.assert_close(found, rows_out(layer, 6))


class LowRank(nn.Module):
    """LoRA: W + s·B A, the base frozen."""

    def __init__(self, rows, cols, rank=2):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, cols) / 3)
        self.lora_B = nn.Parameter(torch.randn(rows, rank) / 3)

    def forward(self, base):
        return base + self.lora_B @ self.lora_A


class Adapted(pl.LightningModule):
    """A layer under LoRA as a parametrization, beside one of κ = 10⁴."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(6, 6)
        parametrize.register_parametrization(self.layer, "weight", LowRank(6, 6))
        self.layer.parametrizations.weight.original.requires_grad_(False)
        self.other = nn.Linear(6, 6)
        self.other.weight.data = torch.diag(torch.logspace(0, 4, 6))

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - 1).square().mean() + 1e-8 * self.other(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3)


LORA = [f"layer.parametrizations.weight.0.lora_{half}" for half in "AB"]
BASE = "layer.parametrizations.weight.original"


def fit(module, root, *callbacks):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4))


def test_low_rank_parametrization_is_one_weight_with_all_that_makes_it():
    net = Adapted()
    found = {weight.name: weight for weight in find_weights(net)}
    assert list(found) == [BASE, "other.weight"]
    assert set(found[BASE].companions) == set(LORA)
    assert found[BASE].is_trainable
    torch.testing.assert_close(found[BASE].read(), net.layer.weight.detach())
    for parameter in net.layer.parameters():
        parameter.requires_grad_(False)
    assert not found[BASE].is_trainable


def test_monitor_follows_the_effective_weight_of_a_frozen_base_whose_adapter_trains(tmp_path):
    net, monitor = Adapted(), KappaMonitor()
    before = kappa(net.layer.weight)
    fit(net, tmp_path, monitor)
    after = kappa(net.layer.weight)
    assert abs(after / before - 1) > 0.01
    first, last = monitor.history[0]["kappa"], monitor.history[-1]["kappa"]
    assert first[BASE] == pytest.approx(before, rel=2e-3)
    assert last[BASE] == pytest.approx(after, rel=2e-3)


def test_freeze_takes_a_weight_whose_base_is_frozen_and_adapter_trains_for_a_candidate(tmp_path):
    net = Adapted()
    base = net.layer.parametrizations.weight.original.detach().clone()
    callback = KappaFreezeCallback(num_tensors=1)
    fit(net, tmp_path, callback)
    assert callback.selected_names == [BASE]
    assert set(callback.trained_names) == set(LORA)
    assert torch.equal(net.layer.parametrizations.weight.original, base)


def test_adapter_of_a_weight_that_is_not_selected_does_not_move(tmp_path):
    net = Adapted()
    before = net.layer.weight.detach().clone()
    fit(net, tmp_path, KappaFreezeCallback(num_tensors=1, exclude=["layer.*"], train_vectors=True))
    assert torch.equal(net.layer.weight, before)


def test_modes_of_a_parametrization_are_put_back_through_train():
    class Merging(nn.Module):
        """Keeps something in step with its mode, as LoRA layers do that merge in train(False)."""

        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", nn.Sequential(Merging()))
    layer.train()
    only(layer).read()
    merging = layer.parametrizations.weight[0][0]
    assert merging.training
    assert not merging.merged


def test_weight_made_on_the_meta_device_has_its_shape_and_says_what_to_do():
    layer = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(8, 4, 3, device="meta"))
    weight = only(layer)
    assert weight.stack_shape == (1, 4, 24)
    with pytest.raises(ValueError, match=r"original1 is on the meta device.*load"):
        weight.read()
