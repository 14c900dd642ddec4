"""The signal along the first steps against sums that are made by hand in float64."""

import copy

import pytest
import torch
from tiny import random_state, snapshot
from torch import nn

from kappa_lightning.probes import TaskInputs
from kappa_lightning.sensitivity import SensitivityProfile
from kappa_lightning.sensitivity.exact import exact_passes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))


torch.manual_seed(1)
BATCHES = [(torch.randn(8, 3), torch.randint(4, (8,))) for _ in range(3)]
NAMES = ("0.weight", "2.weight")


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def profile_of(model, optimizer, **options):
    return SensitivityProfile.from_model(
        model, BATCHES, loss, reference=TaskInputs(), method="path", optimizers=[optimizer], progress=False, **options
    )


def by_hand(model, optimizer, alongside=()):
    """−Σ_t g_t·(w_(t+1) − w_t) of the two matrices, which alone move but for what trains alongside."""
    found = dict.fromkeys(NAMES, 0.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in NAMES or name in alongside)
    for batch in BATCHES:
        optimizer.zero_grad()
        loss(model, batch).backward()
        before = {name: model.get_parameter(name).detach().clone() for name in NAMES}
        gradients = {name: model.get_parameter(name).grad.clone() for name in NAMES}
        optimizer.step()
        for name in NAMES:
            moved = model.get_parameter(name).detach().double() - before[name].double()
            found[name] -= float((gradients[name].double() * moved).sum())
    return found


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_signal_is_the_sum_of_gradient_times_movement(make):
    # Adam moves the entries by 1e-4 of their size, where single precision would lose the difference.
    other = network()
    expected = by_hand(other, make(other.parameters(), lr=1e-4))
    model = network()
    profile = profile_of(model, make(model.parameters(), lr=1e-4))
    for name in NAMES:
        assert profile[name].signal == pytest.approx(expected[name], rel=1e-6)
    assert profile.settings.method == "path"


@pytest.mark.parametrize("method", ["path", "trial"])
def test_what_trains_whatever_is_chosen_trains_along_and_is_put_back(method):
    def deeper():
        return nn.Sequential(*network(), nn.Linear(4, 4))

    def measured(lr, always):
        model = deeper()
        groups = [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": lr}]
        before = snapshot(model)
        profile = SensitivityProfile.from_model(
            model, BATCHES, loss, reference=TaskInputs(), method=method, steps=3, progress=False, include=NAMES,
            always_train=always, optimizers=[torch.optim.SGD(groups, lr=0.1)],
        )  # fmt: skip
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
        assert all(parameter.grad is None for parameter in model.parameters())
        return [profile[name].signal for name in NAMES]

    alone, along = measured(0.5, ()), measured(0.5, ["3.*"])
    assert along != pytest.approx(alone, rel=1e-3)
    # A rate of zero is not to train along.
    assert measured(0.0, ["3.*"]) == alone
    if method == "path":
        other = deeper()
        groups = [{"params": other[:3].parameters()}, {"params": other[3].parameters(), "lr": 0.5}]
        expected = by_hand(other, torch.optim.SGD(groups, lr=0.1), alongside=("3.weight", "3.bias"))
        assert along == pytest.approx([expected[name] for name in NAMES], rel=1e-5)


def test_signals_add_up_to_the_fall_of_the_loss():
    whole = (torch.cat([batch[0] for batch in BATCHES]), torch.cat([batch[1] for batch in BATCHES]))
    model, other = network(), network()
    profile = SensitivityProfile.from_model(
        model, [whole] * 20, loss, reference=TaskInputs(), method="path",
        optimizers=[torch.optim.SGD(model.parameters(), lr=0.01)], progress=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD([other.get_parameter(name) for name in NAMES], lr=0.01)
    start = loss(other, whole).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(other, whole).backward()
        optimizer.step()
    assert sum(row.signal for row in profile) == pytest.approx(start - loss(other, whole).item(), rel=0.01)


def movements(lr):
    """By how much the path moves the two matrices."""
    model, start = network(), network()
    by_hand(model, torch.optim.SGD(model.parameters(), lr=lr))
    return {name: (model.get_parameter(name) - start.get_parameter(name)).detach().double() for name in NAMES}


def test_interactions_are_those_of_the_full_fisher_information_along_the_movements():
    model, moved = network(), movements(0.05)
    profile = profile_of(model, torch.optim.SGD(model.parameters(), lr=0.05))
    exact = network().double()
    parameters = [exact.get_parameter(name) for name in NAMES]
    x = torch.cat([batch[0] for batch in BATCHES]).double()
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for row in x:
        log_p = exact(row[None])[0].log_softmax(-1)
        for k in range(4):
            g = torch.autograd.grad(log_p[k], parameters, retain_graph=True)
            score = torch.stack([(one * moved[name]).sum() for one, name in zip(g, NAMES, strict=True)])
            expected += log_p[k].exp().detach() * torch.outer(score, score) / len(x)
    assert profile.interactions == pytest.approx(expected.numpy(), rel=2e-2)
    assert [row.sensitivity for row in profile] == pytest.approx(profile.interactions.diagonal())
    assert profile.settings.rows == 24


def test_predicted_forgetting_is_the_divergence_of_moving_all_chosen_together():
    # Half the matrix' sum is the KL to second order, with what tensors do together.
    model, moved = network(), movements(0.02)
    profile = profile_of(model, torch.optim.SGD(model.parameters(), lr=0.02))
    x = torch.cat([batch[0] for batch in BATCHES]).double()
    for names in (NAMES, NAMES[:1], NAMES[1:]):
        start, end = network().double(), network().double()
        with torch.no_grad():
            for name in names:
                end.get_parameter(name).add_(moved[name])
            p, q = start(x).log_softmax(-1), end(x).log_softmax(-1)
        divergence = float((p.exp() * (p - q)).sum(-1).mean())
        signal = sum(profile[name].signal for name in names)
        assert profile.forgetting(names) == pytest.approx(2 * divergence / signal**2, rel=0.05)
    alone = sum(profile[name].sensitivity for name in NAMES)
    assert profile.interactions.sum() > 1.2 * alone  # so the terms between tensors matter here


def test_profile_with_interactions_is_saved_and_loaded(tmp_path):
    model = network()
    profile = profile_of(model, torch.optim.SGD(model.parameters(), lr=0.05))
    profile.save(tmp_path / "profile.json")
    loaded = SensitivityProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert loaded.forgetting(NAMES) == profile.forgetting(NAMES)
    assert loaded.among(NAMES[1:]).interactions == pytest.approx(profile.interactions[1:, 1:])
    state = profile.to_dict()
    for wrong in ([[1.0]], [[float("nan")] * 2] * 2, "no"):
        with pytest.raises(ValueError, match="its interactions are no"):
            SensitivityProfile.from_dict(state | {"interactions": wrong})
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for 1 rows"):
        SensitivityProfile([next(iter(profile))], interactions=profile.interactions)


def test_path_changes_nothing():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss(model, BATCHES[0]).backward()
    optimizer.step()
    before, numbers, state = snapshot(model), random_state(), copy.deepcopy(optimizer.state_dict())
    gradient = model[0].weight.grad.clone()
    profile_of(model, optimizer)
    assert random_state() == numbers
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert torch.equal(model[0].weight.grad, gradient)
    for index, entries in state["state"].items():
        assert all(torch.equal(entries[key], optimizer.state_dict()["state"][index][key]) for key in entries)


def test_rate_that_is_too_high_is_an_error_that_says_so_and_puts_the_weights_back():
    model = network()
    model[2].register_forward_hook(lambda layer, inputs, output: output * layer.weight.square().sum().exp())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"in step \d of training to measure signals.*train with a lower rate"):
        profile_of(model, torch.optim.SGD(model.parameters(), lr=1e4))
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_scale_of_the_loss_leaves_the_signal():
    from kappa_lightning.sensitivity.gradients import differentiating
    from kappa_lightning.sensitivity.path import signals_along
    from kappa_lightning.weights import find_weights

    found = {}
    for scale in (1.0, 1024.0):
        model = network()
        weights = find_weights(model)
        with differentiating(model, weights):
            found[scale] = signals_along(
                weights,
                lambda number, model=model: loss(model, BATCHES[number]),
                [torch.optim.SGD(model.parameters(), lr=0.1)],
                steps=3,
                scale=scale,
            )[0]
    assert found[1.0] == pytest.approx(found[1024.0], rel=1e-6)


def test_exact_passes_put_the_settings_of_the_process_back():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16), exact_passes(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == before[1]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]


def test_path_needs_an_optimizer():
    with pytest.raises(ValueError, match=r'method="path".*give optimizers=\[…\]'):
        SensitivityProfile.from_model(network(), BATCHES, loss, method="path", progress=False)


def test_optimizer_that_needs_a_closure_is_refused():
    model = network()
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        profile_of(model, torch.optim.LBFGS(model.parameters()))
