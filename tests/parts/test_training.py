"""Parts of a parameter that train: gradients, memory, state and everything that could move the frozen rest."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kappa_lightning.parts import Part, expert_parts, gate_up_parts, head_parts, train_parts
from kappa_lightning.weights import find_weights


class Experts(nn.Module):
    """Fused experts as transformers has them: the weight is read once for each expert."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(count, 6, 5))
        self.down = nn.Parameter(torch.randn(count, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x
        for expert in range(len(self.gate_up)):
            gate, up = functional.linear(x, self.gate_up[expert]).chunk(2, -1)
            total = total + functional.linear(functional.silu(gate) * up, self.down[expert])
        return total


def batch() -> torch.Tensor:
    return torch.randn(7, 5)


def test_gradients_of_the_parts_are_those_entries_of_the_whole_gradient():
    model = Experts()
    plain = copy.deepcopy(model)
    x = batch()
    plain(x).square().sum().backward()
    training = train_parts(
        model, [*expert_parts("gate_up", (4, 6, 5))[1:3], Part("down", "3", (3,)), Part("down", "0", (0,))]
    )
    model(x).square().sum().backward()
    assert list(training.parameters) == ["gate_up[1]", "gate_up[2]", "down[3]", "down[0]"]
    for name, index in (("gate_up", 1), ("gate_up", 2), ("down", 3), ("down", 0)):
        expected = getattr(plain, name).grad[index]
        assert torch.equal(training.parameters[f"{name}[{index}]"].grad, expected)
    assert model._parameters["gate_up"].grad is None
    assert not model._parameters["gate_up"].requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5, foreach=False),
        lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True),
        lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=2),
    ],
)
def test_frozen_rest_stays_as_it_was_to_the_last_bit_and_the_parts_move(make):
    model = Experts()
    before = copy.deepcopy(model.state_dict())
    training = train_parts(model, [*gate_up_parts("gate_up", (4, 6, 5))[2:3], Part("down", "3", (3,))])
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(4):

        def closure():
            optimizer.zero_grad()
            loss = model(batch()).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

        optimizer.step(closure)
    after = model.state_dict()
    assert list(after) == list(before)
    frozen = torch.ones_like(before["gate_up"], dtype=torch.bool)
    frozen[1, :3] = False
    assert torch.equal(after["gate_up"][frozen], before["gate_up"][frozen])
    assert (after["gate_up"][~frozen] != before["gate_up"][~frozen]).all()
    assert torch.equal(after["down"][:3], before["down"][:3])
    assert (after["down"][3] != before["down"][3]).all()
    assert {tuple(p.shape) for p in optimizer.param_groups[0]["params"]} == {(3, 5), (5, 3)}
    assert set(training.parameters) == {"gate_up[1:gate]", "down[3]"}


def test_training_of_all_parts_is_training_of_the_whole():
    whole, split = Experts(), None
    split = copy.deepcopy(whole)
    train_parts(split, [*expert_parts("gate_up", (4, 6, 5)), *expert_parts("down", (4, 5, 3))])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (whole, split)]
    for _ in range(3):
        x = batch()
        for model, optimizer in zip((whole, split), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), split.state_dict().values(), strict=True))


def test_parts_lie_in_the_memory_of_the_whole_also_after_a_move():
    model = Experts()
    training = train_parts(model, expert_parts("down", (4, 5, 3))[2:3])
    part = training.parameters["down[2]"]
    assert part.data_ptr() == model._parameters["down"][2].data_ptr()
    model.double()
    assert part.dtype == torch.float64
    assert part.data_ptr() == model._parameters["down"][2].data_ptr()
    assert part is model._parameters["down[2]"]


def test_state_dict_has_the_names_and_loads_into_both_forms():
    plain, split = Experts(), Experts()
    training = train_parts(split, expert_parts("down", (4, 5, 3))[:2])
    assert list(split.state_dict()) == ["gate_up", "down"]
    split.load_state_dict(plain.state_dict())
    assert torch.equal(training.parameters["down[1]"], plain.down[1])
    plain.load_state_dict(split.state_dict())


def test_copy_trains_its_own_parts():
    model = Experts()
    train_parts(model, expert_parts("down", (4, 5, 3))[:1])
    other = copy.deepcopy(model)
    part = other._parameters["down[0]"]
    assert part.data_ptr() == other._parameters["down"].data_ptr() != model._parameters["down"].data_ptr()
    other(batch()).sum().backward()
    assert part.grad is not None
    assert model._parameters["down[0]"].grad is None


def test_other_values_in_place_of_a_part_are_what_the_layer_uses():
    model = Experts()
    train_parts(model, expert_parts("down", (4, 5, 3))[:2])
    other = copy.deepcopy(model.state_dict())
    replaced = torch.randn(5, 3, requires_grad=True)
    other["down"][1] = replaced.detach()
    plain = Experts()
    plain.load_state_dict(other)
    x = batch()
    result = torch.func.functional_call(model, {"down[1]": replaced}, (x,))
    torch.testing.assert_close(result, plain(x))
    result.square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(replaced.grad, plain.down.grad[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(model, {"down[1]": replaced}, (x,)), plain(x))


def test_matrices_of_a_model_whose_parts_train_are_those_of_before():
    model = Experts()
    names = [weight.name for weight in find_weights(model)]
    model.gate_up.requires_grad_(False)
    train_parts(model, expert_parts("down", (4, 5, 3))[:1])
    weights = {weight.name: weight for weight in find_weights(model)}
    assert list(weights) == names
    assert weights["down"].is_trainable
    assert not weights["gate_up"].is_trainable


def test_undo_leaves_a_module_as_it_was_with_the_trained_weights():
    model = Experts()
    model.gate_up.requires_grad_(False)
    kind = type(model)
    training = train_parts(model, [*expert_parts("gate_up", (4, 6, 5))[:1], *expert_parts("down", (4, 5, 3))[:1]])
    assert type(model) is not kind
    assert type(model).__name__ == kind.__name__
    with torch.no_grad():
        training.parameters["down[0]"].zero_()
    training.undo()
    assert type(model) is kind
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [("gate_up", False), ("down", True)]
    assert not model.down[0].any()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    pickle.dumps(model)


def test_heads_are_rows_of_queries_and_columns_of_the_output():
    layer = nn.ModuleDict({"q": nn.Linear(6, 4, bias=False), "o": nn.Linear(4, 6, bias=False)})
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    parts = [head_parts("q.weight", (4, 6), 2)[1], head_parts("o.weight", (6, 4), 2, dim=1)[0]]
    training = train_parts(layer, parts)
    optimizer = torch.optim.AdamW(training.parameters.values(), lr=0.1)
    layer["o"](torch.tanh(layer["q"](torch.randn(3, 6)))).square().sum().backward()
    optimizer.step()
    after = layer.state_dict()
    assert torch.equal(after["q.weight"][:2], before["q.weight"][:2])
    assert (after["q.weight"][2:] != before["q.weight"][2:]).all()
    assert torch.equal(after["o.weight"][:, 2:], before["o.weight"][:, 2:])
    assert (after["o.weight"][:, :2] != before["o.weight"][:, :2]).all()


def test_gradient_checkpointing_and_accumulation_give_the_gradient_of_the_sum():
    model, plain = Experts(), None
    plain = copy.deepcopy(model)
    training = train_parts(model, expert_parts("down", (4, 5, 3))[1:2])
    xs = [batch(), batch()]
    for x in xs:
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        plain(x).square().sum().backward()
    assert torch.allclose(training.parameters["down[1]"].grad, plain.down.grad[1], rtol=1e-6)


def test_compiled_module_trains_the_parts():
    model = Experts()
    plain = copy.deepcopy(model)
    training = train_parts(model, expert_parts("down", (4, 5, 3))[1:2])
    compiled = torch.compile(model, backend="aot_eager")
    x = batch()
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.allclose(training.parameters["down[1]"].grad, plain.down.grad[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part("up", "0", (0,))], "no parameter up"),
        ([Part("down", "4", (4,))], r"down\[4\] lies outside of down"),
        ([Part("down", "x", (0, slice(3, 9)))], "lies outside"),
        ([Part("down", "1", (1,)), Part("down", "1:a", (1, slice(0, 2)))], "entries in common"),
        ([Part("down", "1", (1,)), Part("down", "-3", (-3,))], "entries in common"),
        ([Part("down", "x", (0, 0, 0, 0))], "4 dimensions"),
    ],
)
def test_bad_parts_are_refused_before_anything_changes(parts, message):
    model = Experts()
    kind = type(model)
    with pytest.raises(ValueError, match=message):
        train_parts(model, [Part("gate_up", "0", (0,)), *parts])
    assert type(model) is kind
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["gate_up", "down"]


def test_second_choice_of_the_same_parameter_is_refused():
    model = Experts()
    train_parts(model, [Part("down", "1", (1,))])
    with pytest.raises(ValueError, match="train already"):
        train_parts(model, [Part("down", "2", (2,))])


def test_pickling_a_split_layer_says_what_to_do():
    model = Experts()
    train_parts(model, [Part("down", "1", (1,))])
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(model)
