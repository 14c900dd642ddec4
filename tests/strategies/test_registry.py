from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from tiny import TinyNet, fit, trainable

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor
from kappa_lightning.strategies import (
    DDPAdapter,
    ModelParallelAdapter,
    StrategyAdapter,
    adapter_for,
    register_adapter,
    registry,
)


def with_strategy(kind):
    """A Trainer as far as it is looked at; some strategies cannot be made without their hardware."""
    return SimpleNamespace(strategy=kind.__new__(kind))


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [
        (SingleDeviceStrategy, StrategyAdapter),
        (DDPStrategy, DDPAdapter),
        (ModelParallelStrategy, ModelParallelAdapter),
    ],
)
def test_each_supported_strategy_has_its_adapter(strategy, adapter):
    assert type(adapter_for(with_strategy(strategy))) is adapter


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy])
def test_strategy_that_was_never_seen_to_work_is_refused_with_what_to_use_instead(strategy):
    class Derived(strategy):
        pass

    for kind in (strategy, Derived):
        with pytest.raises(ValueError, match=rf"does not support {kind.__name__}.*: use "):
            adapter_for(with_strategy(kind))


def test_strategy_uses_the_adapter_of_its_nearest_base(monkeypatch):
    class Mine(SingleDeviceStrategy):
        pass

    class Derived(Mine):
        pass

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    trainer = with_strategy(Derived)
    assert adapter_for(trainer) is registry._ADAPTERS[SingleDeviceStrategy]
    nearer = StrategyAdapter()
    register_adapter(Mine, nearer)
    assert adapter_for(trainer) is nearer


def test_refused_strategy_can_be_given_an_adapter(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    mine = DDPAdapter()
    register_adapter(DeepSpeedStrategy, mine)
    assert adapter_for(with_strategy(DeepSpeedStrategy)) is mine


def test_strategy_without_an_adapter_is_an_error_that_names_what_there_is():
    with pytest.raises(ValueError, match=r"no adapter for Unknown: use SingleDeviceStrategy, .*register_adapter"):
        adapter_for(SimpleNamespace(strategy=object.__new__(type("Unknown", (), {}))))


@pytest.mark.parametrize(("strategy", "adapter"), [("ddp", StrategyAdapter()), (DDPStrategy, StrategyAdapter)])
def test_only_a_class_and_an_adapter_can_be_registered(strategy, adapter):
    with pytest.raises(TypeError, match=r"strategy='ddp'|adapter=<class"):
        register_adapter(strategy, adapter)


@pytest.mark.parametrize(
    "callback",
    [
        KappaFreezeCallback(),
        KappaMonitor(),
        ForgettingEval({"old": AccuracyProbe([(torch.ones(1, 7), torch.ones(1))])}),
    ],
)
def test_refusal_comes_before_the_strategy_has_set_anything_up(tmp_path, callback):
    class Refused(SingleDeviceStrategy):
        """Would be set up after the callbacks' hook of that name."""

        def setup(self, trainer):
            raise AssertionError("too late")

    module = TinyNet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_ADAPTERS", {})
        with pytest.raises(ValueError, match="no adapter for Refused"):
            fit(tmp_path, module, callback, strategy=Refused(device=torch.device("cpu")))
    assert trainable(module) == [name for name, _ in module.named_parameters()]
