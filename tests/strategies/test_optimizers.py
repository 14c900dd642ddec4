import pytest
import torch
from torch import nn

from kappa_lightning.strategies.optimizers import drop_from_optimizers


def net_with(kind, **arguments):
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    groups = [
        {"params": [*net["a"].parameters(), *net["b"].parameters()], "lr": 0.1},
        {"params": [*net["c"].parameters()], "lr": 0.01},
    ]
    return net, kind(groups, **arguments)


def step(net, optimizer):
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    net["c"](net["b"](net["a"](inputs))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def drop(optimizers, parameters):
    return drop_from_optimizers(list(optimizers), parameters)


def same(params, expected):
    return [id(parameter) for parameter in params] == [id(parameter) for parameter in expected]


def test_dropped_parameters_leave_their_groups_and_the_others_stay_in_order():
    net, optimizer = net_with(torch.optim.AdamW)
    drop([optimizer], [net["a"].weight, net["b"].bias])
    assert same(optimizer.param_groups[0]["params"], [net["a"].bias, net["b"].weight])
    assert same(optimizer.param_groups[1]["params"], net["c"].parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_dropped_parameters_are_not_moved_by_a_step_although_they_have_gradients():
    net, optimizer = net_with(torch.optim.AdamW, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    drop([optimizer], net["a"].parameters())
    step(net, optimizer)
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"b.weight", "b.bias", "c.weight", "c.bias"}


def test_state_of_dropped_parameters_goes_and_that_of_the_others_stays():
    net, optimizer = net_with(torch.optim.Adam)
    step(net, optimizer)
    kept = optimizer.state[net["b"].weight]
    drop([optimizer], net["a"].parameters())
    assert set(map(id, optimizer.state)) == {id(p) for name in "bc" for p in net[name].parameters()}
    assert optimizer.state[net["b"].weight] is kept


def test_group_that_ends_up_empty_stays_for_schedulers_and_checkpoints():
    net, optimizer = net_with(torch.optim.SGD, momentum=0.9)
    drop([optimizer], net["c"].parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0]
    step(net, optimizer)
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2, 3], []]
    optimizer.load_state_dict(state)


def test_undoing_gives_groups_order_and_state_back():
    net, optimizer = net_with(torch.optim.Adam)
    step(net, optimizer)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    states = dict(optimizer.state)
    undo = drop([optimizer], [*net["a"].parameters(), *net["c"].parameters()])
    undo()
    assert all(same(group["params"], old) for group, old in zip(optimizer.param_groups, groups, strict=True))
    assert len(optimizer.state) == len(states)
    assert all(optimizer.state[parameter] is state for parameter, state in states.items())


def test_undoing_keeps_what_the_remaining_parameters_learned_meanwhile():
    net, optimizer = net_with(torch.optim.Adam)
    step(net, optimizer)
    undo = drop([optimizer], net["a"].parameters())
    step(net, optimizer)
    undo()
    assert optimizer.state[net["a"].weight]["step"].item() == 1
    assert optimizer.state[net["b"].weight]["step"].item() == 2
    step(net, optimizer)
    assert optimizer.state[net["a"].weight]["step"].item() == 2


def test_every_optimizer_loses_them():
    net, first = net_with(torch.optim.SGD)
    second = torch.optim.Adam([*net["a"].parameters(), *net["c"].parameters()])
    undo = drop([first, second], net["a"].parameters())
    assert same(first.param_groups[0]["params"], net["b"].parameters())
    assert same(second.param_groups[0]["params"], net["c"].parameters())
    undo()
    assert same(second.param_groups[0]["params"], [*net["a"].parameters(), *net["c"].parameters()])
    assert len(first.param_groups[0]["params"]) == 4


def test_parameters_may_be_given_as_an_iterator_and_may_be_unknown_to_the_optimizer():
    net, optimizer = net_with(torch.optim.SGD)
    drop([optimizer], iter([nn.Parameter(torch.ones(1)), net["a"].weight]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2]


def test_optimizer_that_has_dealt_its_parameters_out_is_refused_before_any_is_changed():
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Has the name, and none of what needs a process group."""

    net, plain = net_with(torch.optim.SGD)
    dealt = ZeroRedundancyOptimizer(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer .* use a plain optimizer"):
        drop([plain, dealt], net["a"].parameters())
    assert [len(group["params"]) for group in plain.param_groups] == [4, 2]
