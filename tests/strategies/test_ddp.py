"""What DDP does after a freeze: it waits for the gradients that still come, and reduces only those."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from ranks import on_ranks
from script import Net, adapt
from tiny import Spy, make_trainer, numpy_ranking, snapshot, trainable
from torch.nn.parallel import DistributedDataParallel

from kappa_lightning import KappaFreezeCallback


class Counting(DDPStrategy):
    """DDP with a communication hook that counts what it reduces; Lightning itself registers hooks on a GPU only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bytes = 0

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self, reduce)


def reduce(strategy, bucket):  # type: ignore[no-untyped-def] # which PyTorch would want as classes, not as text
    strategy.bytes += bucket.buffer().nbytes
    return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)


def fit_counting(root: Path, freezes: bool, **options: Any) -> dict[str, Any]:
    strategy, module = Counting(**options), Net()
    freeze = KappaFreezeCallback(num_tensors=1, exclude=())
    trainer = make_trainer(root, *([freeze] if freezes else []), strategy=strategy, devices=2, max_epochs=1)
    trainer.fit(module)
    parameters = dict(module.named_parameters())
    return {
        "bytes": strategy.bytes,
        "all": 3 * sum(p.nbytes for p in parameters.values()),
        "trained": 3 * sum(parameters[name].nbytes for name in freeze.trained_names),
        "weights": snapshot(module),
    }


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_frozen_gradients_leave_the_reduction_and_the_hook_stays(tmp_path: Path, options: dict[str, Any]) -> None:
    for result in on_ranks(fit_counting, tmp_path, True, **options):
        assert 0 < result["bytes"] == result["trained"] < result["all"] / 2
    for result in on_ranks(fit_counting, tmp_path, False, **options):
        assert result["bytes"] == result["all"]


def test_processes_hold_the_same_weights_afterwards(tmp_path: Path) -> None:
    one, other = on_ranks(fit_counting, tmp_path, True)
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)


def wrappers(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def before(trainer: Any, module: Any) -> None:
        found["old"] = weakref.ref(trainer.strategy.model)

    def after(trainer: Any, module: Any) -> None:
        found["new"] = trainer.strategy.model is not found["old"]()
        found["gone"] = found.pop("old")() is None

    gc.disable()
    callbacks = [Spy(on_fit_start=before), KappaFreezeCallback(num_tensors=1, exclude=()), Spy(on_fit_start=after)]
    make_trainer(root, *callbacks, strategy="ddp", devices=2).fit(Net())
    return found


def test_old_wrapper_and_its_buckets_are_gone_when_training_starts(tmp_path: Path) -> None:
    assert on_ranks(wrappers, tmp_path) == [{"new": True, "gone": True}] * 2


def unfreeze_at_the_second_epoch(root: Path) -> dict[str, Any]:
    freeze, module = KappaFreezeCallback(num_tensors=1, exclude=()), Net()
    halfway: dict[str, torch.Tensor] = {}

    def unfreeze(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            halfway.update(snapshot(module))
            freeze.unfreeze()

    strategy = Counting()
    trainer = make_trainer(root, freeze, Spy(on_train_epoch_start=unfreeze), strategy=strategy, devices=2, max_epochs=2)
    trainer.fit(module)
    after = snapshot(module)
    parameters = dict(module.named_parameters())
    sizes = [sum(parameters[n].nbytes for n in names) for names in (freeze.selected_names, parameters)]
    return {
        "moved": sorted(name for name in after if not torch.equal(after[name], halfway[name])),
        "weights": after,
        "as expected": strategy.bytes == 3 * sum(sizes) and freeze.trained_names == list(parameters),
    }


def test_unfreezing_in_the_middle_of_a_fit_trains_everything_from_there(tmp_path: Path) -> None:
    one, other = on_ranks(unfreeze_at_the_second_epoch, tmp_path)
    assert one["moved"] == sorted(dict(Net().named_parameters()))
    assert one["as expected"]
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)


def two_fits(root: Path) -> dict[str, Any]:
    freeze, module = KappaFreezeCallback(num_tensors=2, exclude=()), Net()
    trainer = make_trainer(root, freeze, strategy="ddp", devices=2, max_epochs=1)
    trainer.fit(module)
    first, between = freeze.trained_names, snapshot(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    after = snapshot(module)
    return {
        "first": first,
        "second": freeze.trained_names,
        "moved": [name for name in after if not torch.equal(after[name], between[name])],
        "requires_grad": trainable(module),
    }


def test_second_fit_goes_on_with_the_same_tensors(tmp_path: Path) -> None:
    lowest = numpy_ranking(Net(), Net.MATRICES)[:2]
    for result in on_ranks(two_fits, tmp_path):
        assert sorted(lowest) == sorted(result["first"])
        assert result["first"] == result["second"] == result["moved"] == result["requires_grad"]


class Manual(Net):
    """Takes its optimizer steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def two_manual_fits(root: Path) -> dict[str, torch.Tensor]:
    module, strategy = Manual(), DDPStrategy(static_graph=True)
    trainer = make_trainer(
        root,
        KappaFreezeCallback(num_tensors=2, exclude=()),
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    return snapshot(module)


def test_first_reduction_of_every_fit_takes_place_with_a_static_graph_and_manual_optimization(tmp_path: Path) -> None:
    """The processes would drift apart from a step whose gradients were not reduced."""
    one, other = on_ranks(two_manual_fits, tmp_path)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def modules_that_differ(root: Path) -> None:
    freeze = KappaFreezeCallback(
        num_tensors=1, always_train=["head.bias"] if os.environ["RANK"] == "0" else [], exclude=()
    )
    make_trainer(root, freeze, strategy="ddp", devices=2).fit(Net())


def test_processes_that_would_train_different_tensors_stop() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 and 1 do not train the same tensors, head\.bias first"):
        on_ranks(modules_that_differ, Path())


@pytest.mark.slow
def test_script_of_one_process_runs_on_two(tmp_path: Path) -> None:
    """The issue that Lightning's own BackboneFinetuning has: unused parameters without find_unused_parameters."""
    assert all(result["steps"] == 6 for result in on_ranks(adapt, "ddp", tmp_path))
