"""``recoverable=k``: what comes back after k steps on a copy, and a run that does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import TinyNet, fit, loader, make_trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from kappa_lightning import AccuracyProbe, AgreementProbe, ForgettingEval, KappaFreezeCallback, PerplexityProbe, Probe

CLASSES = 4


def _batches(count: int = 8, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count, size), generator=generator)
    return [(functional.one_hot(row, CLASSES).float(), row) for row in labels]


class Classifier(pl.LightningModule):
    """Knows its classes; the new task moves its bias (out of line) or takes its features away (lost)."""

    def __init__(self, harm: str) -> None:
        super().__init__()
        self.features = nn.Linear(CLASSES, CLASSES, bias=False)
        self.head = nn.Linear(CLASSES, CLASSES)
        self.dropout = nn.Dropout(0.5)
        self.harm = harm
        with torch.no_grad():
            for layer in (self.features, self.head):
                layer.weight.copy_(3 * torch.eye(CLASSES))
            self.head.bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.harm == "out of line":
            return functional.relu(20 - self.head.bias[0]).sum() + 0 * self(batch[0]).sum()
        return 50 * (self.features.weight.square().sum() + self.head.weight.square().sum()) + 0 * self(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The steps back are taken at this rate as well, without what Adam remembers.
        return torch.optim.Adam(self.parameters(), lr=0.5)


def _harmed(folder: Path, harm: str) -> dict[str, float]:
    callback = ForgettingEval({"old": AccuracyProbe(_batches(24))}, recoverable=16)
    data = DataLoader(TensorDataset(torch.randn(40, CLASSES), torch.zeros(40).long()), 1)
    module = Classifier(harm)
    if harm == "lost":
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)  # type: ignore[method-assign]
    make_trainer(folder, callback, max_epochs=1).fit(module, data)
    assert callback.history[0]["forgetting/old/recoverable"] == pytest.approx(1)
    return callback.history[-1]


def test_what_is_out_of_line_comes_back_and_what_is_lost_does_not(tmp_path: Path) -> None:
    misaligned = _harmed(tmp_path / "a", "out of line")
    assert misaligned["forgetting/old/retention"] < 0.5
    assert misaligned["forgetting/old/recoverable"] > 0.95
    lost = _harmed(tmp_path / "b", "lost")
    assert lost["forgetting/old/retention"] < 0.6
    assert lost["forgetting/old/recoverable"] < 0.6


def _trained(folder: Path, recoverable: int | None) -> tuple[dict[str, Any], Tensor]:
    torch.manual_seed(3)
    module = Classifier("out of line")
    callback = ForgettingEval({"old": AccuracyProbe(_batches())}, every_n_train_steps=2, recoverable=recoverable)
    data = DataLoader(TensorDataset(torch.randn(12, CLASSES), torch.zeros(12).long()), 2, shuffle=True)
    trainer = make_trainer(folder, callback, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, data)
    assert ("forgetting/old/recoverable" in callback.history[-1]) == (recoverable is not None)
    state = {f"weights.{name}": tensor for name, tensor in module.state_dict().items()}
    moments = trainer.optimizers[0].state_dict()["state"]
    state |= {f"{n}.{key}": value for n, entry in moments.items() for key, value in entry.items()}
    return state, torch.get_rng_state()


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    (without, numbers), (beside, same) = _trained(tmp_path / "a", None), _trained(tmp_path / "b", 3)
    assert without.keys() == beside.keys()
    assert all(torch.equal(without[key], beside[key]) for key in without)
    assert torch.equal(numbers, same)


def test_one_step_is_that_of_the_same_optimizer_on_the_first_batch(tmp_path: Path) -> None:
    data = [(torch.randn(6, 3), torch.randn(6, 1)) for _ in range(3)]

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def squared(module: Any, batch: Any) -> Tensor:
        return functional.mse_loss(module.layer(batch[0]), batch[1])

    module = Line()
    weight, bias = (p.detach().double().numpy().copy() for p in (module.layer.weight, module.layer.bias))
    probe = Probe(data, MeanSquaredError(), lambda module, b: (module.layer(b[0]), b[1]), loss=squared)
    callback = ForgettingEval({"line": probe}, recoverable=1)
    make_trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1).fit(
        module, DataLoader(TensorDataset(*data[0]))
    )
    # By hand in float64: one step of gradient descent on the first batch, the error on the other two.
    (x, y), *rest = [(inputs.double().numpy(), wanted.double().numpy()) for inputs, wanted in data]

    def error(w: Any, b: Any) -> float:
        return float(sum(((x @ w.T + b - y) ** 2).sum() for x, y in rest) / 12)

    residual = 2 / 6 * (x @ weight.T + bias - y)
    after = error(weight - 0.1 * residual.T @ x, bias - 0.1 * residual.sum(0))
    assert callback.history[0]["forgetting/line/recoverable"] == pytest.approx(error(weight, bias) / after, rel=1e-5)


def test_perplexity_and_agreement_have_a_loss(tmp_path: Path) -> None:
    class Bigrams(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            # Each token is followed by the next number.
            self.table = nn.Embedding.from_pretrained(4 * torch.eye(7).roll(1, 1), freeze=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.table.weight.square().mean() * 100

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    text = [{"input_ids": (torch.arange(12) + k).remainder(7)[None]} for k in range(6)]
    callback = ForgettingEval({"text": PerplexityProbe(text), "self": AgreementProbe(text)}, recoverable=4)
    make_trainer(tmp_path, callback, max_epochs=1, limit_train_batches=8).fit(Bigrams(), DataLoader(torch.zeros(8, 1)))
    last = callback.history[-1]
    for name in ("text", "self"):
        assert last[f"forgetting/{name}/recoverable"] > last[f"forgetting/{name}/retention"]


def test_baseline_of_the_other_batches_survives_a_resume(tmp_path: Path) -> None:
    def callback(k: int | None) -> ForgettingEval:
        return ForgettingEval({"old": AccuracyProbe(_batches(4))}, recoverable=k)

    def data() -> Any:
        return DataLoader(TensorDataset(torch.randn(8, CLASSES)), 2)

    whole = callback(2)
    make_trainer(tmp_path / "w", whole, max_epochs=2).fit(Classifier("out of line"), data())
    trainer = make_trainer(tmp_path / "a", callback(2), max_epochs=1)
    trainer.fit(Classifier("out of line"), data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = callback(2)
    make_trainer(tmp_path / "b", resumed, max_epochs=2).fit(
        Classifier("out of line"), data(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert resumed.history == whole.history
    without = make_trainer(tmp_path / "c", callback(None), max_epochs=1)
    without.fit(Classifier("out of line"), data())
    without.save_checkpoint(tmp_path / "half.ckpt")
    late = make_trainer(tmp_path / "d", callback(2), max_epochs=2)
    with pytest.raises(ValueError, match=r"half.ckpt has no baseline for recoverable=2"):
        late.fit(Classifier("out of line"), data(), ckpt_path=tmp_path / "half.ckpt")


def _no_loss() -> Probe:
    return Probe(_batches(), MeanSquaredError(), lambda module, batch: batch)


@pytest.mark.parametrize(
    ("probe", "steps", "said"),
    [
        (_no_loss, 2, r"'old', and Probe has no loss: give it loss="),
        (
            lambda: AccuracyProbe(_batches(2)),
            2,
            "probe 'old' and measures the others, and it has 2",
        ),
        (lambda: AccuracyProbe(DataLoader(TensorDataset(*_batches(1)[0]), 2, shuffle=True)), 2, "shuffle=False"),
        (lambda: AccuracyProbe(_batches()), 0, "recoverable=0 must be an int of at least 1"),
        (lambda: AccuracyProbe(_batches()), True, "recoverable=True must be an int"),
    ],
)
def test_what_cannot_be_recovered_is_told_at_once(probe: Any, steps: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ForgettingEval({"old": probe()}, recoverable=steps)


def test_loss_without_a_gradient_is_named_and_nothing_changes(tmp_path: Path) -> None:
    probe = Probe(
        loader(), MeanSquaredError(), lambda m, b: (torch.ones(2), torch.zeros(2)), loss=lambda m, b: torch.ones(())
    )
    module = TinyNet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    with pytest.raises(ValueError, match="loss of the probe 'old' is no scalar tensor with a gradient"):
        fit(tmp_path, module, ForgettingEval({"old": probe}, recoverable=1))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value is parameters[name] for name, value in module.named_parameters())


class _Experts(Classifier):
    """A head of fused experts, of which single ones train."""

    def __init__(self) -> None:
        super().__init__("out of line")
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(0.1 * torch.randn(2, CLASSES, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + torch.einsum("bi,eij->bj", inputs, self.experts.down_proj)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.experts.down_proj + 10 * torch.eye(CLASSES)).square().sum()


def test_single_experts_take_the_steps_and_are_put_back(tmp_path: Path) -> None:
    def run(recoverable: int | None) -> tuple[ForgettingEval, Tensor]:
        torch.manual_seed(3)
        module = _Experts()
        callback = ForgettingEval({"old": AccuracyProbe(_batches())}, every_n_train_steps=40, recoverable=recoverable)
        freeze = KappaFreezeCallback(num_tensors=1, experts="each", include=["experts*"])
        make_trainer(tmp_path, freeze, callback, max_epochs=1).fit(
            module, DataLoader(TensorDataset(torch.zeros(40, 1)), 1)
        )
        return callback, module.experts.down_proj.detach().clone()

    (beside, weights), (_, without) = run(6), run(None)
    assert torch.equal(weights, without)
    last = beside.history[-1]
    assert last["forgetting/old/retention"] < 0.9
    assert last["forgetting/old/recoverable"] > last["forgetting/old/retention"] + 0.05


def test_each_optimizer_steps_its_own_parameters(tmp_path: Path) -> None:
    """Muon takes matrices alone, so what the other optimizer has must go to one like that."""

    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__("out of line")
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            matrices = [p for p in self.parameters() if p.ndim == 2]
            vectors = [p for p in self.parameters() if p.ndim != 2]
            return torch.optim.Muon(matrices, lr=1e-4), torch.optim.Adam(vectors, lr=0.5)

    callback = ForgettingEval({"old": AccuracyProbe(_batches(24))}, recoverable=16)
    data = DataLoader(TensorDataset(torch.randn(40, CLASSES), torch.zeros(40).long()), 1)
    make_trainer(tmp_path, callback, max_epochs=1).fit(Two(), data)
    last = callback.history[-1]
    assert last["forgetting/old/retention"] < 0.5
    assert last["forgetting/old/recoverable"] > 0.95
