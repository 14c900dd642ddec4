"""Whatever a module keeps: an evaluation restores it, or says that it cannot before it is lost."""

from __future__ import annotations

import array
import collections
import ctypes
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kappa_lightning.evaluation import adapters_off, undisturbed


class Slotted:
    __slots__ = ("__hidden", "count", "seen")

    def __init__(self) -> None:
        self.count, self.seen, self.__hidden = 0, [1], 0

    def update(self) -> None:
        self.count += 1
        self.seen.append(2)
        self.__hidden += 1
        if not hasattr(self, "late"):
            self.count += 1

    def state(self) -> Any:
        return self.count, list(self.seen), self.__hidden


@dataclass(frozen=True, slots=True)
class Frozen:
    log: list[int]
    number: int = 1

    def update(self) -> None:
        self.log.append(1)
        object.__setattr__(self, "number", self.number + 1)

    def state(self) -> Any:
        return list(self.log), self.number


class Empty:
    """Has no attribute before it is used."""

    def update(self) -> None:
        self.count = getattr(self, "count", 0) + 1

    def state(self) -> Any:
        return dict(vars(self))


class Held:
    """Something that a module keeps, a way to move it and what shows that it moved."""

    def __init__(self, value: Any, move: Callable[[Any], Any], state: Callable[[Any], Any]) -> None:
        self.value, self.move, self.state = value, move, state


def _updating(value: Any) -> Held:
    return Held(value, lambda v: v.update(), lambda v: v.state())


class Key:
    pass


_KEY = Key()


def _weak(kind: Any) -> Any:
    made = kind()
    made.update([_KEY] if kind is weakref.WeakSet else {"k": _KEY} if "Value" in kind.__name__ else {_KEY: 1})
    return made


def _lists() -> Any:
    made = np.empty(2, object)
    made[:] = [[1], [2]]
    return made


KINDS: dict[str, Callable[[], Held]] = {
    "bytearray": lambda: Held(bytearray(b"abc"), lambda v: v.extend(b"d"), bytes),
    "array": lambda: Held(array.array("d", [1.0]), lambda v: v.append(2.0), list),
    "ctypes": lambda: Held(ctypes.c_int(3), lambda v: setattr(v, "value", 4), lambda v: v.value),
    "memoryview": lambda: Held(memoryview(bytearray(b"ab")), lambda v: v.__setitem__(0, 7), bytes),
    "BytesIO": lambda: Held(io.BytesIO(b"ab"), lambda v: v.write(b"xyz"), lambda v: (v.getvalue(), v.tell())),
    "StringIO": lambda: Held(io.StringIO("ab"), lambda v: v.write("xyz"), lambda v: (v.getvalue(), v.tell())),
    "slots": lambda: _updating(Slotted()),
    "frozen dataclass": lambda: _updating(Frozen([])),
    "object without attributes": lambda: _updating(Empty()),
    "UserDict": lambda: Held(collections.UserDict(a=1), lambda v: v.update(b=2), dict),
    "UserList": lambda: Held(collections.UserList([1]), lambda v: v.append(2), list),
    "ChainMap": lambda: Held(collections.ChainMap({"a": 1}), lambda v: v.update(b=2), dict),
    "Counter": lambda: Held(collections.Counter("aab"), lambda v: v.update("b"), dict),
    "WeakSet": lambda: Held(_weak(weakref.WeakSet), lambda v: v.clear(), len),
    "WeakKeyDictionary": lambda: Held(_weak(weakref.WeakKeyDictionary), lambda v: v.clear(), len),
    "WeakValueDictionary": lambda: Held(_weak(weakref.WeakValueDictionary), lambda v: v.clear(), len),
    "BitGenerator": lambda: Held(np.random.PCG64(1), lambda v: v.random_raw(), lambda v: v.state["state"]),
    "array of objects": lambda: Held(_lists(), lambda v: v[0].append(1), str),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["attribute", "list", "tuple", "object"])
def test_kind_of_value_is_put_back_wherever_it_is(kind: str, place: str) -> None:
    held = KINDS[kind]()
    net, before = nn.Linear(2, 2), held.state(held.value)
    holder = Key()
    holder.value = held.value  # type: ignore[attr-defined]
    net.kept = {"attribute": held.value, "list": [held.value], "tuple": (held.value,), "object": holder}[place]
    with undisturbed(net):
        held.move(held.value)
        assert held.state(held.value) != before
    assert held.state(held.value) == before


def test_what_hooks_and_closures_collect_is_put_back() -> None:
    net, seen, count = nn.Linear(2, 2), [], 0

    def collect(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal count
        count += 1
        seen.append(output)

    class Recorder:
        def __init__(self) -> None:
            self.outputs: list[Tensor] = []

        def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.outputs.append(output)

    recorder = Recorder()
    net.register_forward_hook(collect)
    net.register_forward_hook(recorder.hook)
    with undisturbed(net):
        net(torch.ones(2))
        assert (count, len(seen), len(recorder.outputs)) == (1, 1, 1)
    assert (count, len(seen), len(recorder.outputs)) == (0, 0, 0)


class Counted(nn.Linear):
    calls: ClassVar[int] = 0
    cache: ClassVar[dict[str, int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.cache[str(self.calls)] = self.calls
        type(self).late = True
        return super().forward(x)


def test_attributes_of_the_scripts_classes_are_put_back() -> None:
    net = nn.Sequential(Counted(2, 2))
    with undisturbed(net):
        net(torch.ones(2))
        assert Counted.calls == 1
    assert (Counted.calls, Counted.cache, hasattr(Counted, "late")) == (0, {}, False)


@pytest.mark.parametrize("hide", [lambda n, t: n.__dict__.update(teacher=t), lambda n, t: setattr(n, "nets", [t])])
def test_modules_that_are_hidden_from_pytorch_are_put_back(hide: Any) -> None:
    net, teacher = nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2))
    hide(net, teacher)
    with undisturbed(net):
        teacher(torch.randn(4, 2) + 9)
        teacher.eval()
    assert teacher[0].running_mean.tolist() == [0, 0]
    assert teacher.training
    assert teacher[0].training
    with pytest.raises(RuntimeError, match=r"changed .*0\.weight in place"), undisturbed(net):
        teacher[0].weight.add_(1)


class Script(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.items = torch.jit.Attribute([1], list[int])
        self.register_buffer("total", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        self.items = self.items + [2]  # noqa: RUF005 - TorchScript knows no other
        self.total = self.total + x
        self.mean.add_(1)
        return x


def test_attributes_of_a_scripted_module_are_put_back() -> None:
    net = nn.Sequential(torch.jit.script(Script()))
    with undisturbed(net):
        net(torch.ones(1))
        assert net[0].number == 1
    assert (net[0].number, net[0].items, net[0].total.item(), net[0].mean.item()) == (0, [1], 0.0, 0.0)


@pytest.mark.parametrize(
    "change", [lambda n: n.half(), lambda n: setattr(n.weight, "data", torch.zeros(3)), lambda n: n.to("meta")]
)
def test_memory_that_a_parameter_stood_for_is_put_back(change: Any) -> None:
    net, optimizer = nn.Linear(2, 2), None
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before, weight = net.weight.detach().clone(), net.weight
    with undisturbed(net):
        change(net)
    assert net.weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    assert torch.equal(net.weight, before)


def test_change_past_the_count_of_versions_is_an_error() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="changed weight in place"), undisturbed(net):
        net.weight.data.mul_(1.5)


def test_attributes_of_parameters_and_the_class_of_a_layer_are_put_back() -> None:
    net = nn.Linear(2, 2)
    net.weight.steps = 3
    weight = net.weight
    with undisturbed(net):
        net.weight.steps, net.weight.late = 4, True
        net.__class__ = Counted
    assert type(net) is nn.Linear
    assert net.weight is weight
    assert vars(weight) == {"steps": 3}


@pytest.mark.parametrize("make", [iter, reversed, lambda items: itertools.count(len(items)), lambda i: iter(dict(i))])
@pytest.mark.parametrize("place", ["attribute", "list", "tuple", "object"])
def test_iterators_that_can_be_copied_stay_where_they_were(make: Any, place: str) -> None:
    if place != "attribute" and make is not iter:
        return
    stream = make([(1, 1), (2, 2), (3, 3)])
    net, holder = nn.Linear(1, 1), Key()
    holder.value = stream  # type: ignore[attr-defined]
    net.kept = {"attribute": stream, "list": [stream], "tuple": (stream,), "object": holder}[place]
    with undisturbed(net):
        inner = {"attribute": lambda k: k, "object": lambda k: k.value}.get(place, lambda k: k[0])(net.kept)
        expected = [next(inner), next(inner)]
    found = {"attribute": lambda k: k, "object": lambda k: k.value}.get(place, lambda k: k[0])(net.kept)
    assert found is stream
    assert [next(stream), next(stream)] == expected


def _numbers() -> Iterator[int]:
    yield from range(5)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(_numbers, "generator"), (lambda: zip(_numbers()), "zip"), (lambda: iter(DataLoader(range(3))), "DataLoaderIter")],
)
def test_iterator_that_cannot_be_copied_is_not_read(make: Any, kind: str) -> None:
    net = nn.Linear(1, 1)
    net.stream = make()
    stream, first = net.stream, next(iter(make()))
    with pytest.raises(RuntimeError, match=rf"reads from stream, a \w*{kind} of the module"), undisturbed(net):
        next(net.stream)
    assert net.stream is stream
    assert next(net.stream) == first
    with undisturbed(net):
        pass


def test_step_that_writes_to_the_modules_loggers_by_itself_writes_nothing(tmp_path: Any) -> None:
    class Writes(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with undisturbed(self):
                self.logger.log_metrics({"probe": 1.0}, step=self.global_step)
                self.loggers[0].log_metrics({"other": 1.0}, step=self.global_step)
            self.logger.log_metrics({"own": 1.0}, step=self.global_step)
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        logger=logger, max_steps=1, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Writes(), DataLoader(torch.ones(2, 1)))
    assert trainer.logger is logger
    logger.save()
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert "own" in header
    assert not {"probe", "other"} & set(header)


def test_base_below_a_merged_adapter_is_put_back_to_the_last_bit() -> None:
    torch.manual_seed(1)
    net = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    nn.init.normal_(next(p for n, p in net.named_parameters() if "lora_B" in n))
    net.base_model.merge_adapter()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with undisturbed(net), adapters_off(net):
        net(torch.ones(1, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
