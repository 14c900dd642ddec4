import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.forgetting.digits import DigitReader, InvertedDigits
from benchmarks.forgetting.methods import check_method, prepare
from benchmarks.forgetting.soft import LENGTHS, StepLengths, step_lengths
from kappa_lightning import KappaProfile


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 16), "b": nn.Linear(5, 5), "c": nn.Linear(16, 4)})


def by_hand(name, values):
    sigma = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    kappa = sigma[0] / sigma[-1]
    return {
        "alike": 1,
        "1/kappa": 1 / kappa,
        "1/(1+ln kappa)": 1 / (1 + np.log(kappa)),
        "rms": np.sqrt((values**2).mean()),
    }[name]


@pytest.mark.parametrize("name", LENGTHS)
def test_length_is_that_of_the_singular_values_over_the_largest(name, net):
    lengths = step_lengths(KappaProfile.from_model(net, progress=False, rtol=1e-6), name)
    expected = {key: by_hand(name, p.detach().numpy()) for key, p in net.named_parameters() if p.ndim == 2}
    largest = max(expected.values())
    assert lengths == pytest.approx({key: value / largest for key, value in expected.items()}, rel=1e-4)


def test_rank_lengths_fall_evenly_from_first_to_last(net):
    profile = KappaProfile.from_model(net, progress=False)
    order = sorted(profile, key=lambda row: row.kappa)
    lengths = step_lengths(profile, "rank:kappa")
    assert [lengths[row.name] for row in order] == pytest.approx([1, 3 / 5, 1 / 5])
    turned = step_lengths(profile, "rank:reversed:kappa")
    assert [turned[row.name] for row in order] == pytest.approx([1 / 5, 3 / 5, 1])


def test_steps_are_those_of_adam_with_a_learning_rate_for_each_tensor(net):
    lengths = {"a.weight": 1.0, "b.weight": 0.25, "c.weight": 0.5}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def gradients(step):
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    callback = StepLengths(lengths)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(3):
        gradients(step)
        callback.on_before_optimizer_step(None, net, optimizer)
        optimizer.step()
        callback.on_train_batch_end(None, net, None, None, step)
    found = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    net.load_state_dict(state)
    groups = [{"params": [p], "lr": 0.1 * lengths.get(name, 1.0)} for name, p in net.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(3):
        gradients(step)
        optimizer.step()
    for name, expected in net.state_dict().items():
        torch.testing.assert_close(found[name], expected)


def test_soft_method_trains_all_matrices_and_nothing_else():
    model = DigitReader(lr=1e-3)
    (callback,) = prepare("soft:1/kappa", model, InvertedDigits(), budget=0.25, strength=0.0, seed=0)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == matrices
    assert callback.lengths.keys() == matrices


@pytest.mark.parametrize("method", ["soft:kappa", "soft:rank:kapa", "wise:soft:"])
def test_unknown_length_is_an_error(method):
    with pytest.raises(ValueError, match=r"is none of|is unknown"):
        check_method(method)


def test_no_length_at_all_is_an_error():
    net = nn.Linear(3, 3)
    nn.init.zeros_(net.weight)
    with pytest.raises(ValueError, match="is 0 for every matrix"):
        step_lengths(KappaProfile.from_model(net, progress=False), "rms")
