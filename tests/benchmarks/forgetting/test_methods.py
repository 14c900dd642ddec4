import math

import pytest
import torch
from torch import nn

from benchmarks.forgetting.digits import DigitReader, InvertedDigits
from benchmarks.forgetting.methods import METHODS, PullTowardsStart, check_method, prepare
from kappa_lightning import KappaFreezeCallback
from kappa_lightning.weights import find_weights

BUDGET = 0.25


@pytest.fixture
def model() -> DigitReader:
    return DigitReader(lr=1e-3)


def prepared(method, model, strength=0.0, seed=0):
    return prepare(method, model, InvertedDigits(), budget=BUDGET, strength=strength, seed=seed)


def candidates(model):
    return sum(weight.parameter.numel() for weight in find_weights(model))


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def logits(model):
    return model(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method", ["lora_all", "lora_kappa", "osf", "last_layers"])
def test_method_trains_about_the_budget_and_starts_from_the_pretrained_function(method, model):
    limit, before = BUDGET * candidates(model), logits(model)
    assert prepared(method, model) == []
    assert 0.85 * limit < trainable(model) < 1.1 * limit
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora_all", "lora_kappa", "osf"])
def test_adapter_trains_and_nothing_pretrained_does(method, model):
    names = dict(model.named_parameters())
    prepared(method, model)
    logits(model).square().sum().backward()
    assert all(parameter.grad is None for parameter in names.values())
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_lora_reaches_every_linear_and_convolutional_layer(model):
    prepared("lora_all", model)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    plain = DigitReader(lr=1e-3)
    assert adapted == {name for name, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def test_last_layers_are_the_last_that_fit(model):
    prepared("last_layers", model)
    order = [weight.name for weight in find_weights(model)]
    chosen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert chosen[-1] == "head.weight"
    assert chosen == [name for name in order if name in chosen]
    # What is skipped is too large for what is left.
    left = BUDGET * candidates(model) - trainable(model)
    first = order.index(chosen[0])
    sizes = {weight.name: weight.parameter.numel() for weight in find_weights(model)}
    assert all(sizes[name] > left for name in order[first:] if name not in chosen)


@pytest.mark.parametrize(
    ("method", "criterion", "within"),
    [("kappa", "kappa", "all"), ("reversed:entropy_deficit within shape", "reversed:entropy_deficit", "shape")],
)
def test_criterion_becomes_a_freeze_callback_with_the_budget(method, criterion, within, model):
    (freeze,) = prepared(method, model, seed=3)
    assert isinstance(freeze, KappaFreezeCallback)
    assert (freeze.criterion, freeze.within, freeze.seed) == (criterion, within, 3)
    assert freeze.budget.max_params == math.floor(BUDGET * candidates(model))


@pytest.mark.parametrize("method", ["full", "wise_ft"])
def test_full_leaves_everything_as_it_is(method, model):
    assert prepared(method, model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pull_adds_the_gradient_of_half_the_squared_distance(model):
    (pull,) = prepared("l2_sp", model, strength=0.3)
    assert isinstance(pull, PullTowardsStart)
    assert set(pull.names) == {name for name, _ in model.named_parameters()}
    pull.on_fit_start(None, model)
    start = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight += torch.randn_like(start)
    loss = logits(model).sum()
    distance = (model.head.weight - start).square().sum()
    (expected,) = torch.autograd.grad(loss + 0.15 * distance, [model.head.weight], retain_graph=True)
    loss.backward()
    pull.on_before_optimizer_step(None, model, None)
    torch.testing.assert_close(model.head.weight.grad, expected)


@pytest.mark.parametrize("method", ["lora", "kappa within", "reversed:random2", ""])
def test_unknown_method_is_an_error_that_lists_the_known_ones(method):
    if method == "kappa within":
        check_method("kappa within shape")
        method = "kapa within shape"
    with pytest.raises(ValueError, match=r"full, last_layers, lora_all.*'kappa'"):
        check_method(method)


def test_every_method_is_described():
    import benchmarks.forgetting.methods as module

    assert all(f"\n{name} " in module.__doc__ for name in METHODS)
