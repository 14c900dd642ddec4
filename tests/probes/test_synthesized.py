"""Inputs that a classifier synthesizes: it recognizes them, and nothing else changes."""

import pytest
import torch
from tiny import random_state, snapshot
from torch import nn

from kappa_lightning.probes import Gaussian, SynthesizedInputs, TaskInputs
from kappa_lightning.sensitivity import SensitivityProfile


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        with torch.no_grad():
            self.net[3].weight.mul_(16)

    def forward(self, pixels):
        return self.net(pixels)


def images(count=6):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        (images(), lambda made: made),
        ((images(), torch.zeros(6, dtype=torch.int64)), lambda made: made[0]),
        ({"pixels": images(), "labels": torch.zeros(6, dtype=torch.int64)}, lambda made: made["pixels"]),
    ],
)
def test_model_is_sure_of_the_class_that_was_drawn_for_each_input(batch, inputs):
    model = Classifier()
    (made,) = SynthesizedInputs(steps=100).prepare(model, [batch])
    x = inputs(made)
    classes = torch.randint(3, (6,), generator=torch.Generator().manual_seed(0))
    assert len(set(classes.tolist())) > 1
    before, after = model(images()).softmax(-1), model(x).softmax(-1)
    own = torch.arange(6), classes
    assert bool((after[own] > 0.8).all())
    assert not bool((before[own] > 0.8).all())
    # Within what the batch's inputs span.
    assert images().min() <= x.min()
    assert x.max() <= images().max()
    assert not x.requires_grad


def test_first_step_is_adams_along_the_gradient_of_the_classes_log_probability():
    model, x = Classifier().double(), images().double()
    (made,) = SynthesizedInputs(steps=1, rate=0.01).prepare(model, [x])
    classes = torch.randint(3, (6,), generator=torch.Generator().manual_seed(0))
    start = x.clone().requires_grad_(True)
    model(start).log_softmax(-1)[torch.arange(6), classes].sum().backward()
    step = 0.01 * x.std(correction=0) * start.grad.sign()
    torch.testing.assert_close(made, (x + step).clamp(x.min(), x.max()), rtol=0, atol=1e-6)


def test_nothing_of_the_model_changes_and_equal_seeds_make_equal_inputs():
    model, batch = Classifier(), images()
    model.net[1].weight.grad = torch.ones(12, 16)
    before, numbers, given = snapshot(model), random_state(), batch.clone()
    with torch.no_grad():
        (one,), (again,), (other,) = (SynthesizedInputs(seed=seed).prepare(model, [batch]) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(batch, given)
    assert random_state() == numbers
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert torch.equal(model.net[1].weight.grad, torch.ones(12, 16))
    assert model.net[3].weight.grad is None


def test_half_precision_inputs_keep_their_type():
    model = Classifier().bfloat16()
    (made,) = SynthesizedInputs(steps=20).prepare(model, [images().bfloat16()])
    assert made.dtype == torch.bfloat16
    assert not torch.equal(made, images().bfloat16())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, tokens):
        return self.embed(tokens).mean(1)


class Regression(Classifier):
    def output_distribution(self, batch):
        return Gaussian(self(batch))


class Dense(nn.Conv2d):
    def __init__(self):
        super().__init__(1, 3, 1)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Tokens(), torch.zeros(2, 5, dtype=torch.int64), r"the inputs are torch.int64 of shape \(2, 5\)"),
        (Regression(), images(), "the model says Gaussian with 6 rows"),
        (Dense(), (images(), torch.zeros(6, 4, 4, dtype=torch.int64)), "Categorical with 96 rows for 6 samples"),
        (Classifier(), {"pixels": images(), "depth": images()}, "found: pixels, depth"),
        (Classifier(), 3, "the batch is a int without a tensor"),
    ],
)
def test_what_cannot_be_synthesized_is_an_error_or_stays_as_it_is(model, batch, message):
    with pytest.raises(TypeError, match=message):
        SynthesizedInputs().prepare(model, [batch])
    reference = SynthesizedInputs(required=False)
    assert reference.prepare(model, [batch]) == [batch]
    assert str(reference) == str(TaskInputs())


def test_profile_says_what_the_model_was_asked_about():
    batches = [(images(), torch.zeros(6, dtype=torch.int64))]
    found = {
        reference: SensitivityProfile.from_model(Classifier(), batches, loss, reference=reference, progress=False)
        for reference in ("auto", "synthesized", "inputs")
    }
    assert found["auto"] == found["synthesized"] != found["inputs"]
    assert "recognizes" in found["auto"].settings.reference
    # By hand: the profile of the inputs that are made.
    made = SynthesizedInputs().prepare(Classifier(), batches)
    given = SensitivityProfile.from_model(Classifier(), batches, loss, reference=made, progress=False)
    for row in given:
        assert found["auto"][row.name].sensitivity == pytest.approx(row.sensitivity, rel=1e-6)


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": True}, {"rate": 0.0}, {"rate": float("nan")}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        SynthesizedInputs(**arguments)
