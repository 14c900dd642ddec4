"""The trial against movements and margins that are computed by hand."""

import copy

import pytest
import torch
from tiny import random_state, snapshot
from torch import nn

from kappa_lightning.probes import TaskInputs
from kappa_lightning.sensitivity import SensitivityProfile


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4))


torch.manual_seed(1)
BATCHES = [(torch.randn(8, 3), torch.randint(4, (8,))) for _ in range(3)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def tried(model, optimizer, steps=5, **options):
    return SensitivityProfile.from_model(
        model, BATCHES, loss, reference=TaskInputs(), method="trial", optimizers=[optimizer], steps=steps,
        progress=False, **options,
    )  # fmt: skip


def sgd(model, lr=0.3):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def mean_loss(model):
    return sum(loss(model, batch).item() for batch in BATCHES) / 3


def mean_divergence(model, before):
    x = torch.cat([batch[0] for batch in BATCHES])
    p, q = before(x).double().log_softmax(-1), model(x).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_margins_are_those_of_taking_back_one_matrix_of_the_trained_model():
    start, trained = network(), network()
    optimizer = sgd(trained)
    for parameter in (trained[0].bias, trained[3].bias):  # no candidates, so they stay
        parameter.requires_grad_(False)
    with torch.enable_grad():
        for step in range(5):
            optimizer.zero_grad()
            loss(trained, BATCHES[step % 3]).backward()
            optimizer.step()
    model = network()
    profile = tried(model, sgd(model))
    for name in ("0.weight", "3.weight"):
        back = copy.deepcopy(trained)
        back.get_parameter(name).copy_(start.get_parameter(name))
        assert profile[name].signal == pytest.approx(mean_loss(back) - mean_loss(trained), rel=1e-4)
        margin = mean_divergence(trained, start) - mean_divergence(back, start)
        assert profile[name].sensitivity == pytest.approx(margin, rel=1e-3)
    assert profile.settings.method == "trial"


def test_trial_changes_nothing():
    model = network(dropout=0.5)
    model[0].weight.grad = torch.ones(6, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 100)
    loss(model, BATCHES[0]).backward()
    optimizer.step()  # a state of its own, and the rate of a warm-up
    scheduler.step()
    gradient = model[0].weight.grad.clone()
    before, numbers, state = snapshot(model), random_state(), copy.deepcopy(optimizer.state_dict())
    attributes = {name: id(value) for name, value in vars(optimizer).items()}
    profile = tried(model, optimizer)
    assert all(row.signal > 0 for row in profile)
    assert random_state() == numbers
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert torch.equal(model[0].weight.grad, gradient)
    assert {name: id(value) for name, value in vars(optimizer).items()} == attributes
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for index, entries in state["state"].items():
        assert all(torch.equal(entries[key], now["state"][index][key]) for key in entries)
    assert all(module.training for module in model.modules())


def test_trial_begins_at_the_rate_that_a_warm_up_leads_to():
    def figures(warm):
        model = network()
        optimizer = sgd(model)
        if warm:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        return [(row.signal, row.sensitivity) for row in tried(model, optimizer)]

    assert figures(warm=True) == figures(warm=False)


def test_trial_that_diverges_is_an_error_and_puts_the_weights_back():
    model = network()
    model[3].register_forward_hook(lambda layer, inputs, output: output * layer.weight.square().sum().exp())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"loss is (nan|inf)"):
        tried(model, sgd(model, lr=1e4))
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_trial_needs_an_optimizer_and_a_known_method():
    with pytest.raises(ValueError, match=r"give optimizers=\[…\]"):
        SensitivityProfile.from_model(network(), BATCHES, loss, method="trial", progress=False)
    with pytest.raises(ValueError, match="method='guess' is unknown"):
        SensitivityProfile.from_model(network(), BATCHES, loss, method="guess", progress=False)


def test_tensor_that_hurts_has_no_signal_and_is_not_for_free():
    # Of a tensor that is not moved both margins are 0: it is neither a bargain nor unknown to the reference.
    model = network()
    profile = tried(model, torch.optim.SGD([model[3].weight], lr=0.3))
    assert profile["0.weight"].signal == 0
    assert 0 < profile["0.weight"].sensitivity < profile["3.weight"].sensitivity
    assert profile.select() == ["3.weight"]
