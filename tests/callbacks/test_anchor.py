"""The anchor's gradient against a hand calculation, and everything that must not change around it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from tiny import (
    Spy,
    TinyNet,
    adamw_with_schedule,
    assert_same_tensors,
    events,
    fit,
    loader,
    make_trainer,
    random_state,
    scalars,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import KappaFreezeCallback, PretrainedAnchor
from kappa_lightning.anchoring.batches import load_batches
from kappa_lightning.probes import SynthesizedInputs, TaskInputs

TASK = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
OLD = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
LR, STRENGTH = 0.3, 2.0


class OwnInputs(TaskInputs):
    """May do anything with the task's batches."""


class Softmax(pl.LightningModule):
    """Softmax regression in float64, whose gradients fit on a line."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(5, 3, bias=False).double()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x.double()))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(TASK, LABELS), batch_size=4)


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def task_gradient(weight: np.ndarray, batch: slice) -> np.ndarray:
    x = TASK[batch].double().numpy()
    error = softmax(x @ weight.T)
    error[np.arange(len(x)), LABELS[batch].numpy()] -= 1
    return error.T @ x / len(x)


def anchor_gradient(weight: np.ndarray, start: np.ndarray, old: Tensor) -> np.ndarray:
    """Of the mean over the rows of KL(p ‖ q): its derivative by the logits is q − p."""
    x = old.double().numpy()
    return (softmax(x @ weight.T) - softmax(x @ start.T)).T @ x / len(x)


def trained(root: Path, anchor: Callback | None, module: pl.LightningModule | None = None, **options: Any) -> Any:
    module = module or Softmax()
    callbacks = [] if anchor is None else [anchor]
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module)
    return module, trainer


@pytest.mark.parametrize("source", ["recorded", "forward"])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_steps_are_those_of_the_sum_of_both_gradients(tmp_path: Path, source: Any, clip: float | None) -> None:
    anchor = PretrainedAnchor([(OLD[:3],), (OLD[3:],)], STRENGTH, source=source, new_task_divergence=False)
    module, _ = trained(tmp_path, anchor, gradient_clip_val=clip)
    start = Softmax().linear.weight.detach().numpy()
    weight = start.copy()
    for step in range(4):
        batch, old = slice(4 * (step % 2), 4 * (step % 2) + 4), OLD[3 * (step % 2) : 3 * (step % 2) + 3]
        gradient = task_gradient(weight, batch) + STRENGTH * anchor_gradient(weight, start, old)
        norm = np.linalg.norm(gradient)
        if clip is not None and norm > clip:
            gradient *= clip / norm
        weight -= LR * gradient
    # p is kept in float32.
    np.testing.assert_allclose(module.linear.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-7)
    without, _ = trained(tmp_path, None, gradient_clip_val=clip)
    assert not np.allclose(without.linear.weight.detach().numpy(), weight, rtol=1e-3)


def test_accumulated_batches_get_one_addition(tmp_path: Path) -> None:
    anchor = PretrainedAnchor([(OLD,)], STRENGTH, new_task_divergence=False)
    module, _ = trained(tmp_path, anchor, accumulate_grad_batches=2, max_epochs=3)
    start = Softmax().linear.weight.detach().numpy()
    weight = start.copy()
    for _ in range(3):
        both = (task_gradient(weight, slice(0, 4)) + task_gradient(weight, slice(4, 8))) / 2
        weight -= LR * (both + STRENGTH * anchor_gradient(weight, start, OLD))
    np.testing.assert_allclose(module.linear.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-7)


def test_every_second_step(tmp_path: Path) -> None:
    anchor = PretrainedAnchor([(OLD,)], STRENGTH, every_n_steps=2, new_task_divergence=False)
    module, _ = trained(tmp_path, anchor)
    start = Softmax().linear.weight.detach().numpy()
    weight = start.copy()
    for step in range(4):
        gradient = task_gradient(weight, slice(4 * (step % 2), 4 * (step % 2) + 4))
        if step % 2 == 0:
            gradient += STRENGTH * anchor_gradient(weight, start, OLD)
        weight -= LR * gradient
    np.testing.assert_allclose(module.linear.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("exclude", [False, True])
def test_gradient_on_the_task_batch_with_and_without_the_target(tmp_path: Path, exclude: bool) -> None:
    anchor = PretrainedAnchor("batch", STRENGTH, exclude_target=exclude)
    module, _ = trained(tmp_path, anchor)
    start = Softmax().linear.weight.detach().numpy()
    weight = start.copy()
    for step in range(4):
        batch = slice(4 * (step % 2), 4 * (step % 2) + 4)
        x, labels = TASK[batch].double().numpy(), LABELS[batch].numpy()
        p, q = softmax(x @ start.T), softmax(x @ weight.T)
        if exclude:
            for rows in (p, q):
                rows[np.arange(4), labels] = 0
                rows /= rows.sum(-1, keepdims=True)
        weight -= LR * (task_gradient(weight, batch) + STRENGTH * (q - p).T @ x / 4)
    np.testing.assert_allclose(module.linear.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-7)


def test_weight_pull_is_decay_towards_the_start_as_adamw_decays_towards_zero(tmp_path: Path) -> None:
    """A model that is shifted by its start turns the pull into AdamW's own decay."""

    class Shifted(Softmax):
        def __init__(self, decay: float, zero: bool) -> None:
            super().__init__()
            self.decay = decay
            if zero:
                self.register_buffer("start", self.linear.weight.detach().clone())
                nn.init.zeros_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x.double() @ self.start.T if hasattr(self, "start") else 0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=self.decay)

    decayed, _ = trained(tmp_path, None, Shifted(0.7, True))
    anchor = PretrainedAnchor([(OLD,)], 0.0, weight_pull=0.7, new_task_divergence=False)
    pulled, _ = trained(tmp_path, anchor, Shifted(0.0, False))
    expected = decayed.linear.weight + decayed.start
    torch.testing.assert_close(pulled.linear.weight, expected, rtol=1e-10, atol=1e-12)


class Generator16(MixedPrecision):
    """What Lightning makes of precision="16-mixed" on a GPU, on the CPU."""

    def __init__(self, scale: float = 2.0**12) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        super().__init__("16-mixed", "cpu", scaler)


class Half(Softmax):
    def __init__(self) -> None:
        super().__init__()
        self.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("clip", [None, 0.4])
def test_scaler_scales_both_gradients_alike(tmp_path: Path, clip: float | None) -> None:
    options = {"gradient_clip_val": clip, "max_epochs": 3}
    make = lambda: PretrainedAnchor([(OLD,)], STRENGTH, new_task_divergence=False)  # noqa: E731
    full, _ = trained(tmp_path, make(), Half(), **options)
    half, trainer = trained(tmp_path, make(), Half(), plugins=[Generator16()], **options)
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**12
    torch.testing.assert_close(half.linear.weight, full.linear.weight, rtol=0.02, atol=2e-3)
    without, _ = trained(tmp_path, None, Half(), **options)
    assert (without.linear.weight - full.linear.weight).abs().max() > 0.02


def test_an_overflow_of_the_anchor_makes_the_scaler_skip_the_step(tmp_path: Path) -> None:
    """The task's own gradient is finite at this scale, the anchor's is not."""
    anchor = PretrainedAnchor([(OLD,)], 1e5, new_task_divergence=False)
    module = Half()
    plugin = Generator16(2.0**14)
    before: list[Tensor] = []
    spy = Spy(on_train_batch_start=lambda _, m: before.append(m.linear.weight.detach().clone()))
    trainer = make_trainer(tmp_path, spy, anchor, max_epochs=2, plugins=[plugin])
    trainer.fit(module)
    assert not torch.equal(before[0], before[1])  # q = p at the first step, so nothing overflows
    assert torch.equal(before[1], before[2])
    assert plugin.scaler.get_scale() < 2.0**14
    assert torch.isfinite(module.linear.weight).all()


class Watched(TinyNet):
    """TinyNet with dropout, on a shuffled dataloader: all that random numbers can touch."""

    def __init__(self) -> None:
        super().__init__(adamw_with_schedule, dropout=0.3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(loader().dataset, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader()


def old_batches() -> list[tuple[Tensor]]:
    tokens = torch.randint(11, (9, 7), generator=torch.Generator().manual_seed(9))
    return [(tokens[:4],), (tokens[4:],)]


def watched(root: Path, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> tuple[Watched, pl.Trainer, Any]:
    torch.manual_seed(1)
    module = Watched()
    torch.manual_seed(2)
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 3, "log_every_n_steps": 1, **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer, random_state()


@pytest.mark.parametrize("reference", ["given", "batch", "inputs"])
def test_strength_zero_is_bit_identical_to_a_run_without(tmp_path: Path, reference: str) -> None:
    plain, one, numbers = watched(tmp_path)
    anchor = PretrainedAnchor(old_batches() if reference == "given" else reference, 0.0)
    with_anchor, other, numbers_with = watched(tmp_path, anchor)
    assert plain.losses == with_anchor.losses
    assert_same_tensors(snapshot(plain), snapshot(with_anchor))
    assert numbers == numbers_with
    same_state(one.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    assert other.callback_metrics["anchor/new_task_divergence"] > 0  # and it has measured


def same_state(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        for first, second in zip(one, other, strict=True):
            same_state(first, second)
    else:
        assert one == other


def test_an_anchor_leaves_random_numbers_modes_and_statistics_alone(tmp_path: Path) -> None:
    """The loss at the first step is the same: what the anchor did before it left no trace."""
    plain, _, numbers = watched(tmp_path)
    anchored, _, numbers_with = watched(tmp_path, PretrainedAnchor(old_batches(), 5.0))
    assert plain.losses[0] == anchored.losses[0]
    assert plain.losses[-1] != anchored.losses[-1]
    assert numbers == numbers_with
    assert anchored.training


@pytest.mark.parametrize(
    ("reference", "options", "folder"),
    [
        ("given", {"max_divergence": 0.01, "weight_pull": 0.01}, False),
        ("given", {"source": "forward", "every_n_steps": 2}, True),
        ("inputs", {}, True),
        ("batch", {"exclude_target": True}, False),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, reference: str, options: dict[str, Any], folder: bool
) -> None:
    def make(name: str) -> tuple[KappaFreezeCallback, PretrainedAnchor]:
        given = old_batches() if reference == "given" else reference
        directory = tmp_path / name if folder else None
        return KappaFreezeCallback(num_tensors=2), PretrainedAnchor(given, 3.0, directory=directory, **options)

    def run(name: str, ckpt_path: Any = None, **more: Any) -> tuple[TinyNet, pl.Trainer, PretrainedAnchor]:
        module, callbacks = TinyNet(adamw_with_schedule), make(name)
        return module, fit(tmp_path, module, *callbacks, ckpt_path=ckpt_path, **more), callbacks[1]

    expected, trainer, whole = run("whole", max_epochs=4)
    half, interrupted, _ = run("parts", max_epochs=2)
    interrupted.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other, second = run("parts", tmp_path / "half.ckpt", max_epochs=4)
    assert half.losses + resumed.losses == expected.losses
    assert_same_tensors(snapshot(resumed), snapshot(expected))
    assert second.strength == whole.strength
    same_state(other.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


def test_a_checkpoint_without_an_anchor_is_refused(tmp_path: Path) -> None:
    _, trainer, _ = watched(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="no pretrained weights of PretrainedAnchor"):
        watched(tmp_path, PretrainedAnchor(old_batches()), ckpt_path=tmp_path / "plain.ckpt")


def test_a_second_fit_compares_with_the_first_start(tmp_path: Path) -> None:
    anchor = PretrainedAnchor(old_batches(), 1.0)
    module, *_ = watched(tmp_path, anchor)
    again = make_trainer(tmp_path, anchor, max_steps=1, log_every_n_steps=1)
    again.fit(module)
    assert again.callback_metrics["anchor/divergence"] > 1e-4


class Adam(Softmax):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def divergences(root: Path, anchor: PretrainedAnchor) -> list[float]:
    """Before each of 80 steps of Adam."""
    found: list[float] = []
    spy = Spy(on_train_batch_end=lambda t, _: found.append(t.callback_metrics["anchor/divergence"].item()))
    make_trainer(root, anchor, spy, max_epochs=40, log_every_n_steps=1).fit(Adam())
    return found


@pytest.mark.parametrize("strength", [0.2, 20.0])
def test_the_budget_is_held_from_below_and_from_above(tmp_path: Path, strength: float) -> None:
    budget = 0.02
    anchor = PretrainedAnchor([(OLD,)], strength, max_divergence=budget, new_task_divergence=False)
    assert np.mean(divergences(tmp_path, anchor)[-30:]) == pytest.approx(budget, rel=0.2)
    free = PretrainedAnchor([(OLD,)], 0.0, new_task_divergence=False)
    assert divergences(tmp_path, free)[-1] > 3 * budget


def test_logged_figures_are_those_before_the_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    anchor = PretrainedAnchor([(OLD,)], STRENGTH)
    trained(tmp_path, anchor, logger=logger, log_every_n_steps=2)
    folder = Path(logger.log_dir)
    divergence = scalars(folder, "anchor/divergence")
    assert [step for step, _ in divergence] == [0, 2]
    assert divergence[0][1] == pytest.approx(0, abs=1e-6)
    assert [value for _, value in scalars(folder, "anchor/strength")] == [STRENGTH] * 2
    # After two steps, on the first batch of the second epoch.
    start = Softmax().linear.weight.detach().numpy()
    weight = start.copy()
    for step in range(2):
        gradient = task_gradient(weight, slice(4 * step, 4 * step + 4))
        weight -= LR * (gradient + STRENGTH * anchor_gradient(weight, start, OLD))
    x = TASK[:4].double().numpy()
    p, q = softmax(x @ start.T), softmax(x @ weight.T)
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert scalars(folder, "anchor/new_task_divergence")[1][1] == pytest.approx(expected, rel=1e-5)


def test_several_optimizers_by_hand_each_get_their_part(tmp_path: Path) -> None:
    class ByHand(Softmax):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.second = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(super().forward(x))

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=LR) for part in (self.linear, self.second)]

    module, _ = trained(tmp_path, PretrainedAnchor([(OLD,)], STRENGTH, new_task_divergence=False), ByHand())
    expected, start = ByHand(), ByHand()
    with torch.no_grad():
        p = start(OLD).log_softmax(-1)
    for step in range(4):
        batch = slice(4 * (step % 2), 4 * (step % 2) + 4)
        for part in (expected.linear, expected.second):
            divergence = nn.functional.kl_div(expected(OLD).log_softmax(-1), p, log_target=True, reduction="batchmean")
            loss = nn.functional.cross_entropy(expected(TASK[batch]), LABELS[batch]) + STRENGTH * divergence
            gradients = torch.autograd.grad(loss, list(part.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(part.parameters(), gradients, strict=True):
                    parameter -= LR * gradient
    torch.testing.assert_close(module.linear.weight, expected.linear.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.second.weight, expected.second.weight, rtol=1e-5, atol=1e-7)


class TwoByHand(Softmax):
    """Two optimizers, of which those in ``silent`` step without Lightning's hooks."""

    def __init__(self, silent: Sequence[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.silent = silent
        self.second = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        hooked, silent = self.optimizers(), self.optimizers(use_pl_optimizer=False)
        for number in range(2):
            optimizer = (silent if number in self.silent else hooked)[number]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.linear.parameters(), lr=LR), torch.optim.Adam(self.second.parameters(), lr=LR)]


@pytest.mark.parametrize("silent", [(), (1,), (0, 1)])
def test_an_optimizer_that_steps_without_the_hooks_is_named_once(tmp_path: Path, silent: Sequence[int]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path, PretrainedAnchor([(OLD,)], STRENGTH, new_task_divergence=False), TwoByHand(silent))
    said = [str(warning.message) for warning in caught if "saw no step" in str(warning.message)]
    kinds = ["SGD (optimizer 0)", "Adam (optimizer 1)"]
    assert len(said) == min(1, len(silent))
    assert all(kinds[silent[0]] in text and "use_pl_optimizer=False" in text for text in said)


def test_a_tensor_that_is_unfrozen_later_is_compared_with_its_own_start(tmp_path: Path) -> None:
    module = Watched()
    module.head.requires_grad_(False)
    unfreeze = Spy(on_train_epoch_start=lambda t, m: m.head.requires_grad_(t.current_epoch >= 1))
    anchor = PretrainedAnchor(old_batches(), 1.0, source="forward")
    start = snapshot(module)
    trainer = make_trainer(tmp_path, unfreeze, anchor, max_epochs=2)
    trainer.fit(module)
    state = anchor.state_dict()["pretrained"]["tensors"]
    assert torch.equal(state["head.weight"], start["head.weight"])
    assert not torch.equal(module.head.weight, start["head.weight"])


def test_lbfgs_is_refused_before_anything_happens(tmp_path: Path) -> None:
    class Line(Softmax):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    module = Line()
    before = snapshot(module)
    with pytest.raises(ValueError, match="LBFGS searches along a line"):
        trained(tmp_path, PretrainedAnchor([(OLD,)]), module)
    assert_same_tensors(before, snapshot(module))


def test_recorded_distributions_that_do_not_fit_give_way_to_a_pass(tmp_path: Path) -> None:
    small = PretrainedAnchor([(OLD,)], max_bytes=10, new_task_divergence=False)
    trained(tmp_path, small)
    assert small.source == "forward"
    with pytest.raises(ValueError, match="more than max_bytes=10"):
        trained(tmp_path, PretrainedAnchor([(OLD,)], max_bytes=10, source="recorded"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1}, "strength=-1 must be"),
        ({"strength": math.nan}, "strength=nan must be"),
        ({"max_divergence": 0}, "max_divergence=0 must be"),
        ({"strength": 0.0, "max_divergence": 0.1}, "cannot be raised"),
        ({"reference": "generate"}, "neither a file nor one of"),
        ({"reference": iter([1])}, "reference is a list_iterator"),
        ({"divergence": "js"}, "divergence='js' is unknown"),
        ({"divergence": "cross_entropy", "exclude_target": True}, "leaves nothing"),
        ({"exclude_target": True, "top_k": 3}, "leave top_k out"),
        ({"reference": "batch", "source": "recorded"}, "batches to come"),
        ({"reference": TaskInputs(), "source": "recorded"}, "batches to come"),
        ({"reference": SynthesizedInputs()}, "SynthesizedInputs makes its inputs of the task's"),
        ({"reference": OwnInputs()}, "OwnInputs makes its inputs of the task's"),
        ({"source": "guess"}, "source='guess' is unknown"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be"),
        ({"weight_pull": -0.1}, "weight_pull=-0.1 must be"),
        ({"batches": True}, "batches=True must be"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainedAnchor(**arguments)


def test_a_module_that_cannot_write_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text of the model's own needs"):
        trained(tmp_path, PretrainedAnchor("generated"))


def test_auto_is_the_task_batch_where_nothing_generates(tmp_path: Path) -> None:
    anchor = PretrainedAnchor()
    trained(tmp_path, anchor)
    assert anchor.state_dict()["references"]["reference"] == "batch"


def test_task_inputs_are_the_task_batch_with_their_own_output(tmp_path: Path) -> None:
    def twice(module: Any, batch: Any) -> Tensor:
        return 2 * module(batch[0])

    weights = []
    for anchor in (
        PretrainedAnchor(TaskInputs(twice), STRENGTH),
        PretrainedAnchor("batch", STRENGTH, output=twice),
        PretrainedAnchor("batch", STRENGTH),
    ):
        weights.append(snapshot(trained(tmp_path, anchor)[0]))
        assert anchor.state_dict()["references"]["reference"] == "batch"
    assert_same_tensors(weights[0], weights[1])
    assert not torch.equal(weights[0]["linear.weight"], weights[2]["linear.weight"])


def test_what_of_the_task_batch_goes_to_the_model(tmp_path: Path) -> None:
    class Wrapped(Softmax):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

        def train_dataloader(self) -> Any:
            return DataLoader([{"x": x, "y": y, "names": "a"} for x, y in zip(TASK, LABELS, strict=True)], 8)

    with pytest.raises(AttributeError, match="double") as caught:
        trained(tmp_path, PretrainedAnchor([(OLD,)]), Wrapped())
    assert "task_inputs=" in caught.value.__notes__[0]
    anchor = PretrainedAnchor([(OLD,)], task_inputs=lambda batch: (batch["x"], batch["y"]))
    _, trainer = trained(tmp_path, anchor, Wrapped(), log_every_n_steps=1)
    assert trainer.callback_metrics["anchor/new_task_divergence"] > 0


def test_references_are_saved_and_loaded(tmp_path: Path) -> None:
    class Keyword(Softmax):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    anchor = PretrainedAnchor([{"x": OLD}], new_task_divergence=False)
    with pytest.raises(ValueError, match="no references yet"):
        anchor.save_references(tmp_path / "references.safetensors")
    one, _ = trained(tmp_path, anchor, Keyword())
    anchor.save_references(tmp_path / "references.safetensors")
    loaded = PretrainedAnchor(tmp_path / "references.safetensors", new_task_divergence=False)
    other, _ = trained(tmp_path, loaded, Keyword())
    assert torch.equal(loaded.references[0]["x"], OLD)
    assert_same_tensors(snapshot(one), snapshot(other))
    (tmp_path / "nonsense").write_bytes(b"12345678nonsense")
    with pytest.raises(ValueError, match="corrupt"):
        trained(tmp_path, PretrainedAnchor(tmp_path / "nonsense"))


@pytest.mark.parametrize(
    ("tensors", "number", "message"),
    [
        ({"0.x": torch.zeros(2)}, "many", "says that it holds 'many' reference batches"),
        ({"0.x": torch.zeros(2)}, "0", "says that it holds '0' reference batches"),
        ({"0.x": torch.zeros(2)}, "2", "lacks the reference batch 1"),
        ({"x": torch.zeros(2)}, "1", "lacks the reference batch 0"),
        ({"x": torch.zeros(2)}, None, "holds no references"),
    ],
)
def test_damaged_references_are_named(
    tmp_path: Path, tensors: dict[str, Tensor], number: str | None, message: str
) -> None:
    file = tmp_path / "references.safetensors"
    described = {"kind": "kappa_lightning.references", "batches": number}
    save_file(tensors, file, None if number is None else described)
    with pytest.raises(ValueError, match=message):
        load_batches(file)


def test_tensorboard_events_are_readable(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, TinyNet(), PretrainedAnchor("batch"), logger=logger, log_every_n_steps=1)
    assert {"anchor/divergence", "anchor/strength", "anchor/new_task_divergence"} <= set(
        events(Path(logger.log_dir)).Tags()["scalars"]
    )
