import sys
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.weights import find_weights

ROWS, COLS = 48, 64


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def plain():
    torch.manual_seed(6)
    return nn.Linear(COLS, ROWS, bias=False)


def profile_of(module, **options):
    return KappaProfile.from_model(module, progress=False, **options)


def numpy_kappa(matrix):
    sigma = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
    return sigma[0] / sigma[-1]


def four_bit(bitsandbytes, quant_type="nf4", nested=True):
    layer = bitsandbytes.nn.Linear4bit(
        COLS, ROWS, bias=False, quant_type=quant_type, compress_statistics=nested, compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": plain().weight.detach()})
    return layer


def eight_bit(bitsandbytes):
    layer = bitsandbytes.nn.Linear8bitLt(COLS, ROWS, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": plain().weight.detach()})
    return layer


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_weight_is_read_as_bitsandbytes_dequantizes_it(bitsandbytes, quant_type, nested):
    net = nn.ModuleDict({"layer": four_bit(bitsandbytes, quant_type, nested).to("cpu")})
    weight = net["layer"].weight
    assert weight.dtype == torch.uint8
    assert tuple(weight.shape) == (ROWS * COLS // 2, 1)
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    (row,) = profile_of(net, rtol=1e-6)
    assert row.kappa == pytest.approx(numpy_kappa(expected), rel=1e-6)
    assert row.kappa != pytest.approx(numpy_kappa(plain().weight), rel=1e-3)
    assert (row.name, row.shape, row.dtype, row.num_parameters) == ("layer.weight", (ROWS, COLS), "uint8", ROWS * COLS)


def test_four_bit_weight_is_what_the_layer_multiplies_by(bitsandbytes):
    layer = four_bit(bitsandbytes).to("cpu")
    (weight,) = find_weights(layer)
    torch.testing.assert_close(weight.matrices()[0], layer(torch.eye(COLS)).T, rtol=1e-4, atol=1e-5)


def test_eight_bit_weight_is_read_with_the_scale_of_each_row(bitsandbytes):
    net = nn.ModuleDict({"layer": eight_bit(bitsandbytes).to("cpu")})
    weight = net["layer"].weight
    assert weight.dtype == torch.int8
    scaled = weight.data.double().numpy() * weight.SCB.double().numpy()[:, None] / 127
    (row,) = profile_of(net, rtol=1e-6)
    assert row.kappa == pytest.approx(numpy_kappa(torch.from_numpy(scaled)), rel=1e-5)
    assert row.kappa == pytest.approx(numpy_kappa(plain().weight), rel=0.05)
    assert (row.name, row.shape, row.dtype) == ("layer.weight", (ROWS, COLS), "int8")


def test_eight_bit_weight_is_the_same_after_a_forward_pass_took_its_scales(bitsandbytes):
    layer = eight_bit(bitsandbytes).to("cpu")
    before = profile_of(layer)
    layer(torch.randn(3, COLS))
    assert profile_of(layer) == before
    before.check(layer)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_check_knows_a_quantized_weight_from_another(bitsandbytes, make):
    layer = make(bitsandbytes).to("cpu")
    profile = profile_of(layer)
    profile.check(layer)
    with torch.no_grad():
        layer.weight.data[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"content of weight differs"):
        profile.check(layer)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_layer_that_bitsandbytes_has_not_quantized_yet_is_read_as_it_is(bitsandbytes, make):
    layer = make(bitsandbytes)  # is quantized only when it is moved to a device
    if not layer.weight.dtype.is_floating_point:
        pytest.skip("this version quantizes at once")
    (row,) = profile_of(layer, rtol=1e-6)
    assert row.kappa == pytest.approx(numpy_kappa(plain().weight), rel=1e-6)
    assert row.shape == (ROWS, COLS)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_reading_leaves_a_quantized_layer_as_it_was(bitsandbytes, make):
    layer = make(bitsandbytes).to("cpu")
    x = torch.randn(3, COLS)
    stored, out = layer.weight.data.clone(), layer(x)
    profile_of(layer)
    assert torch.equal(layer.weight.data, stored)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_library_that_is_gone_is_an_error_that_names_tensor_and_library(bitsandbytes, make, monkeypatch):
    net = nn.ModuleDict({"layer": make(bitsandbytes).to("cpu")})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"layer\.weight .*pip install bitsandbytes"):
        profile_of(net)


class Params4bit(nn.Parameter):
    """Stands in for the class of bitsandbytes, which is told by its name."""

    def __new__(cls, packed, shape):
        parameter = torch.Tensor._make_subclass(cls, packed, False)
        parameter.quant_state = None if shape is None else types.SimpleNamespace(shape=torch.Size(shape))
        return parameter


def packed(shape):
    layer = nn.Linear(4, 6, bias=False)
    layer.weight = Params4bit(torch.zeros(12, 1, dtype=torch.uint8), shape)
    return nn.ModuleDict({"layer": layer})


def test_library_that_is_missing_is_an_error_that_names_tensor_and_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"layer\.weight .*pip install bitsandbytes"):
        profile_of(packed((6, 4)))


def test_quantized_weight_without_its_state_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"layer\.weight is stored as torch\.uint8 .*exclude it by name"):
        profile_of(packed(None))


def test_quantized_weight_can_be_excluded_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    net = packed((6, 4))
    net["other"] = nn.Linear(3, 3)
    assert [row.name for row in profile_of(net, exclude=["layer.*"])] == ["other.weight"]


def test_quantized_weights_are_dequantized_one_at_a_time(monkeypatch):
    alive = []

    def dequantize_4bit(data, state):
        assert not any(reference() is not None for reference in alive)
        numbers = torch.randn(state.shape)
        alive.append(weakref.ref(numbers))
        return numbers

    fake = types.ModuleType("bitsandbytes")
    fake.functional = types.SimpleNamespace(dequantize_4bit=dequantize_4bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    net = nn.ModuleDict({f"layer{index}": packed((6, 4))["layer"] for index in range(4)})
    profile_of(net, device="cpu")
    assert len(alive) == 4


CONFIGURATIONS = {
    "int8": lambda q: q.Int8WeightOnlyConfig(),
    "int4": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "float8": lambda q: q.Float8WeightOnlyConfig(),
    "int8-activations": lambda q: q.Int8DynamicActivationInt8WeightConfig(),
}


@pytest.fixture(params=CONFIGURATIONS)
def torchao_layer(request):
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.ModuleDict({"layer": plain().to(torch.bfloat16)})
    quantization.quantize_(net, CONFIGURATIONS[request.param](quantization))
    assert type(net["layer"].weight.data) is not torch.Tensor
    return net


def test_torchao_weight_is_read_as_it_dequantizes_itself(torchao_layer):
    expected = torchao_layer["layer"].weight.dequantize()
    (row,) = profile_of(torchao_layer, rtol=1e-6)
    assert row.kappa == pytest.approx(numpy_kappa(expected), rel=1e-6)
    assert (row.name, row.shape) == ("layer.weight", (ROWS, COLS))


def test_check_accepts_a_torchao_weight_and_refuses_another(torchao_layer):
    profile = profile_of(torchao_layer)
    profile.check(torchao_layer)
    with torch.no_grad():
        torchao_layer["layer"].weight.qdata.view(torch.uint8)[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"content of layer\.weight differs"):
        profile.check(torchao_layer)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weight_quantized_by_pytorch_is_read_with_its_scales(per_channel):
    numbers = plain().weight.detach()
    if per_channel:
        scales, zeros = torch.linspace(1e-3, 4e-3, ROWS), torch.zeros(ROWS, dtype=torch.long)
        quantized = torch.quantize_per_channel(numbers, scales, zeros, 0, torch.qint8)
    else:
        quantized = torch.quantize_per_tensor(numbers, 2e-3, 3, torch.qint8)
    layer = plain()
    layer.weight = nn.Parameter(quantized, requires_grad=False)
    expected = quantized.int_repr().double()
    scale = quantized.q_per_channel_scales()[:, None] if per_channel else quantized.q_scale()
    expected = (expected - (0 if per_channel else 3)) * scale
    (row,) = profile_of(layer, rtol=1e-6)
    assert row.kappa == pytest.approx(numpy_kappa(expected), rel=1e-5)
    profile_of(layer).check(layer)
