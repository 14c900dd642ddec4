"""What the kind of a layer says of its weight, whatever the layer is wrapped in and whatever its size."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kappa_lightning import KappaProfile
from kappa_lightning.weights import find_weights


def shapes(module):
    return {weight.name: weight.stack_shape for weight in find_weights(module)}


class OwnConvolution(nn.Conv2d):
    """A class that scripting does not keep."""


class OwnTransposed(nn.ConvTranspose2d):
    pass


class OwnNorm(nn.LayerNorm):
    pass


SCRIPTED = {
    "conv1d": nn.Conv1d(4, 6, 3),
    "conv2d": nn.Conv2d(4, 6, (2, 3)),
    "conv3d": nn.Conv3d(2, 6, 2),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed-groups": nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
    "linear": nn.Linear(5, 1),
    "embedding": nn.Embedding(7, 1),
    "layer-norm": nn.LayerNorm((3, 4, 5)),
    "own-conv": OwnConvolution(4, 1, 1),
    "own-transposed": OwnTransposed(4, 6, 3, groups=2),
    "own-norm": OwnNorm((3, 4, 5)),
    "lstm": nn.LSTM(1, 4),
}


@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layer_is_viewed_as_the_layer_that_it_was(kind):
    layer = SCRIPTED[kind]
    scripted = torch.jit.script(nn.Sequential(layer))
    assert shapes(scripted) == shapes(nn.Sequential(layer))
    plain, script = rows_of(nn.Sequential(layer)), rows_of(scripted)
    assert plain == script


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("conv1d", (1, 4, 9)), ("transposed", (1, 4, 9, 9)), ("transposed-groups", (1, 4, 9)), ("layer-norm", (3, 4, 5))],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_layer_is_viewed_as_the_layer_that_it_was(kind, shape):
    layer = SCRIPTED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, torch.randn(shape))
    assert rows_of(traced) == rows_of(layer)


def rows_of(module):
    """The rows, or none if there is no matrix."""
    weights = find_weights(module)
    return list(KappaProfile.from_weights(weights)) if weights else []


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 1), nn.Linear(1, 5), nn.Linear(1, 1), nn.Embedding(7, 1), nn.Conv1d(5, 1, 1), nn.Conv2d(5, 1, 1),
        nn.Conv2d(1, 1, 1), nn.ConvTranspose1d(1, 5, 1), nn.Bilinear(1, 1, 5), Conv1D(1, 5), nn.RNNCell(1, 3),
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_multiply_have_a_matrix_however_thin_it_is(layer):
    first = next(name for name, _ in layer.named_parameters())
    assert first in shapes(layer)
    assert all("bias" not in name for name in shapes(layer))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_of_one_input_column_are_matrices(kind):
    rows = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind] * 5
    layer = kind(1, 5, num_layers=2, bidirectional=True)
    found = shapes(layer)
    assert found["weight_ih_l0"] == found["weight_ih_l0_reverse"] == (1, rows, 1)
    assert found["weight_hh_l1"] == (1, rows, 5)
    assert len(found) == 8
    (row,) = KappaProfile.from_model(layer, include=["weight_ih_l0"], progress=False)
    assert row.kappa == 1.0


def test_projection_of_a_recurrent_layer_to_one_feature_is_a_matrix():
    assert shapes(nn.LSTM(3, 4, proj_size=1))["weight_hr_l0"] == (1, 1, 4)


def test_attention_of_one_feature_has_its_projection():
    assert shapes(nn.MultiheadAttention(1, 1)) == {"in_proj_weight": (1, 3, 1), "out_proj.weight": (1, 1, 1)}


@pytest.mark.parametrize(
    "layer", [nn.Linear(0, 3), nn.Linear(3, 0), nn.Embedding(0, 4), nn.Conv1d(0, 3, 1, bias=False)], ids=str
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layer_without_entries_is_passed_over(layer):
    net = nn.ModuleDict({"empty": layer, "full": nn.Linear(3, 3)})
    assert [row.name for row in KappaProfile.from_model(net, progress=False)] == ["full.weight"]


def test_norm_of_a_class_of_its_own_has_no_matrix():
    class SpatialRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

    assert shapes(SpatialRMSNorm()) == {}


class Spectral(nn.Module):
    """A Fourier layer: a complex weight for each pair of channels and mode."""

    def __init__(self):
        super().__init__()
        self.modes = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.complex64))
        self.mix = nn.Linear(5, 4, dtype=torch.complex128)


def test_complex_weights_have_the_figures_of_numpy():
    net = Spectral()
    profile = KappaProfile.from_model(net, progress=False, rtol=1e-8)
    matrices = {"modes": net.modes.detach().numpy(), "mix.weight": net.mix.weight.detach().numpy()[None]}
    assert [row.name for row in profile] == list(matrices)
    for name, stack in matrices.items():
        sigma = np.linalg.svd(stack.astype(np.complex128), compute_uv=False)
        row = profile[name]
        kappas = row.kappas or (row.kappa,)
        np.testing.assert_allclose(kappas, sigma[:, 0] / sigma[:, -1], rtol=1e-6)
        np.testing.assert_allclose(row.log_volume, np.log(sigma).sum(), rtol=1e-6)
        np.testing.assert_allclose(row.frobenius_norm, np.linalg.norm(stack), rtol=1e-6)
        assert row.matrix_shape == stack.shape[1:]
    profile.check(net)
    with torch.no_grad():
        net.modes.imag[0, 0, 0] += 1
    with pytest.raises(ValueError, match="content of modes differs"):
        profile.check(net)


def test_complex_entry_that_is_not_finite_is_an_error_that_names_the_tensor():
    net = Spectral()
    with torch.no_grad():
        net.mix.weight.imag[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^mix\.weight has entries that are NaN"):
        KappaProfile.from_model(net, progress=False)
