"""The estimators against hand calculations and the full Fisher information of a small model."""

from itertools import product

import numpy as np
import pytest
import torch
from tiny import random_state, snapshot
from torch import nn

from kappa_lightning.probes import Categorical, Gaussian
from kappa_lightning.sensitivity.fisher import sensitivities
from kappa_lightning.sensitivity.gradients import differentiating
from kappa_lightning.sensitivity.signal import kind_of_optimizer, signals
from kappa_lightning.weights import find_weights


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()


def full_fisher_diagonal(model, inputs):
    """Σ over inputs of E_y[(∂ ln p(y)/∂w)²], every class in turn, weighted by its probability."""
    parameters = list(model.parameters())
    total = [np.zeros(tuple(p.shape)) for p in parameters]
    for x in inputs:
        log_p = model(x).log_softmax(-1)
        for label in range(len(log_p)):
            gradients = torch.autograd.grad(log_p[label], parameters, retain_graph=True)
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += float(log_p[label].detach().exp()) * gradient.numpy() ** 2
    return total


def measured(model, inputs, draws, output=Categorical, batch=4, seed=0):
    weights = find_weights(model)
    batches = inputs.split(batch)
    outputs = ((number, lambda x=x: output(model(x))) for number, x in enumerate(batches))
    with differentiating(model, weights):
        return sensitivities(weights, outputs, draws=draws, seed=seed)


class Scripted(Categorical):
    """Draws the labels that it is told to."""

    def __init__(self, logits, labels):
        super().__init__(logits)
        self.labels = labels

    def sample(self, generator):
        return self.labels


def test_squared_gradient_of_a_batch_sum_is_unbiased_for_the_summed_fisher_information():
    # Its exact expectation: every combination of labels of a batch of two, weighted by its probability.
    model, inputs = network(), 3 * torch.randn(2, 3, dtype=torch.float64)
    weights, p = find_weights(model), model(inputs).detach().softmax(-1)
    mean = dict.fromkeys(("0.weight", "2.weight"), 0.0)
    for labels in product(range(4), repeat=2):
        drawn = torch.tensor(labels)
        with differentiating(model, weights):
            found, rows = sensitivities(weights, [(0, lambda drawn=drawn: Scripted(model(inputs), drawn))])
        for name in mean:
            mean[name] += float(p[0, labels[0]] * p[1, labels[1]]) * found[name]
    assert rows == 2
    expected = [diagonal.sum() / 2 for diagonal in full_fisher_diagonal(model, inputs)]
    np.testing.assert_allclose(list(mean.values()), expected, rtol=1e-6)


def test_sensitivity_is_the_trace_of_the_full_fisher_information():
    model, inputs = network(), 3 * torch.randn(12, 3, dtype=torch.float64)
    found, rows = measured(model, inputs, draws=40)
    expected = [diagonal.sum() / 12 for diagonal in full_fisher_diagonal(model, inputs)]
    assert rows == 12 * 40
    # Some three standard errors of 120 squares of this size.
    np.testing.assert_allclose(list(found.values()), expected, rtol=0.25)


def test_sensitivity_of_a_linear_regression_by_hand():
    # ln p = −(y − w·x)²/2σ² has ∂²/∂w_i² = −x_i²/σ², so c = Σ_i mean x_i² / σ² for each output.
    model = nn.Linear(3, 2, bias=False).double()
    inputs = torch.randn(64, 3, dtype=torch.float64)
    found, _ = measured(model, inputs, draws=3, output=lambda mean: Gaussian(mean, 0.5), batch=1)
    expected = 2 * float(inputs.square().sum(1).mean()) / 0.25
    assert found["weight"] == pytest.approx(expected, rel=0.2)


def test_half_the_fisher_information_is_the_divergence_of_a_small_step():
    model, inputs = network(), torch.randn(40, 3, dtype=torch.float64)
    diagonal = full_fisher_diagonal(model, inputs)
    before = model(inputs).log_softmax(-1)
    for parameter, fisher in zip(model.parameters(), diagonal, strict=True):
        entry = np.unravel_index(fisher.argmax(), fisher.shape)
        with torch.no_grad():
            parameter[entry] += 1e-4
            kl = (before.exp() * (before - model(inputs).log_softmax(-1))).sum() / 40
            parameter[entry] -= 1e-4
        assert float(kl) == pytest.approx(0.5 * fisher.max() / 40 * 1e-8, rel=1e-3)


def test_same_seed_gives_the_same_figures_and_another_one_others():
    model, inputs = network(), torch.randn(12, 3, dtype=torch.float64)
    one, again, other = (measured(model, inputs, draws=2, seed=seed)[0] for seed in (1, 1, 2))
    assert one == again != other


def test_signal_by_hand():
    # Loss w·x + v·x²: mean gradients over x = 1 and x = −3 are −1 and 5; over the entries of w the same.
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, 2)), "v": nn.Parameter(torch.zeros(2, 2))})
    losses = [lambda x=x: (model["w"] * x).sum() + (model["v"] * x**2).sum() for x in (1.0, -3.0)]
    weights = find_weights(model)
    with differentiating(model, weights):
        assert signals(weights, losses) == {"w": 4.0, "v": 20.0}
        assert signals(weights, losses, "sgd") == {"w": 4.0, "v": 100.0}


def test_signal_is_that_of_the_whole_set_however_it_is_cut_into_batches():
    model, x, y = network(), torch.randn(24, 3, dtype=torch.float64), torch.randint(4, (24,))

    def losses(size):
        pairs = zip(x.split(size), y.split(size), strict=True)
        return [lambda a=a, b=b: nn.functional.cross_entropy(model(a), b) for a, b in pairs]

    weights = find_weights(model)
    with differentiating(model, weights):
        assert signals(weights, losses(4)) == pytest.approx(signals(weights, losses(24)))


def test_tensor_that_the_loss_does_not_reach_has_no_signal():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    weights = find_weights(model)
    with differentiating(model, weights):
        found = signals(weights, [lambda: model["used"](torch.ones(1, 2)).sum()])
    assert found == {"used.weight": 4.0, "unused.weight": 0.0}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model: model[0].weight.sum() * float("nan"), "the loss is nan"),
        (lambda model: model[0].weight, r"the loss is a tensor of shape \(5, 3\), not a scalar"),
        (lambda model: None, "the loss is NoneType, not a scalar"),
        (lambda model: torch.zeros(()), "has no gradient"),
    ],
)
def test_loss_that_is_none_is_refused(loss, message):
    model = network()
    weights = find_weights(model)
    with differentiating(model, weights), pytest.raises(ValueError, match=message):
        signals(weights, [lambda: loss(model)])


def test_infinite_gradient_names_its_tensor():
    model = network()
    weights = find_weights(model)
    with differentiating(model, weights), pytest.raises(ValueError, match=r"signal of 0\.weight is (nan|inf)"):
        # The loss is 0 and its slope there infinite.
        signals(weights, [lambda: (model[0].weight * 0).abs().sum().sqrt()])


def test_task_without_a_batch_and_reference_without_an_output_are_refused():
    model = network()
    weights = find_weights(model)
    with differentiating(model, weights):
        with pytest.raises(ValueError, match="gave no batch"):
            signals(weights, [])
        with pytest.raises(ValueError, match="gave no output"):
            sensitivities(weights, [])


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.calls, self.seen, self.total = 0, [], torch.zeros(())

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.total += 1
        self.latest = x
        return self.drop(self.norm(self.inner(x)))


def test_module_and_random_numbers_are_left_as_they_were():
    model = Restless()
    model.inner.bias.grad = torch.ones(4)
    kept, before, numbers = model.inner.bias.grad, snapshot(model), random_state()
    weights = find_weights(model)
    with differentiating(model, weights):
        signals(weights, [lambda: model(torch.randn(5, 3)).square().sum()])
        assert model.inner.weight.grad is None
    assert random_state() == numbers
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert (model.calls, model.seen, model.total.item(), hasattr(model, "latest")) == (0, [], 0.0, False)
    assert model.inner.bias.grad is kept
    assert model.inner.weight.grad is None


def test_gradients_of_what_is_no_candidate_are_not_kept():
    model = network()
    weights = find_weights(model)[:1]
    with differentiating(model, weights):
        model(torch.randn(2, 3, dtype=torch.float64)).sum().backward()
        assert model[0].weight.grad is not None
        assert model[2].weight.grad is None


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (torch.optim.Adam, "adam"), (torch.optim.AdamW, "adam"), (torch.optim.RMSprop, "adam"),
        (torch.optim.SGD, "sgd"), (torch.optim.LBFGS, None), (torch.optim.NAdam, "adam"),
    ],
)  # fmt: skip
def test_kind_of_an_optimizer_is_told_by_how_it_steps(optimizer, kind):
    assert kind_of_optimizer(optimizer([nn.Parameter(torch.zeros(2))], lr=0.1)) == kind
    derived = type("Mine", (optimizer,), {})
    assert kind_of_optimizer(derived([nn.Parameter(torch.zeros(2))], lr=0.1)) == kind
