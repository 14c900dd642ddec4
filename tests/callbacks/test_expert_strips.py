"""KappaMonitor draws κ of a layer's experts as a strip, fused or each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import events, make_trainer, numpy_kappa
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kappa_lightning.profile.profile
from kappa_lightning import KappaFreezeCallback, KappaMonitor
from kappa_lightning.callbacks.pictures import expert_strips


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(5, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->bo", self.up_proj, x)


class Separate(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"up_proj": nn.Linear(3, 4, bias=False)}) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert["up_proj"](x) for expert in self]).sum(0)


class Layers(torch.nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": kind(), "out": nn.Linear(4, 3)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["out"](layer["experts"](x).tanh())
        return x


class Mixture(pl.LightningModule):
    def __init__(self, kind: type[nn.Module] = Fused) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Layers(kind)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(root: Path, module: Mixture, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    trainer = make_trainer(root, *callbacks, **options)
    trainer.fit(module, DataLoader(torch.randn(8, 3), 4), ckpt_path=ckpt_path)
    return trainer


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, dict[int, float]], set[tuple[str, int]]]]:
    seen: list[Any] = []

    def draw(strips: Any, trained: Any) -> Any:
        seen.append(({name: dict(strip) for name, strip in strips.items()}, trained))
        return expert_strips(strips, trained)

    monkeypatch.setattr("kappa_lightning.callbacks.pictures.expert_strips", draw)
    return seen


@pytest.mark.parametrize("kind", [Fused, Separate])
def test_every_expert_of_every_layer_is_drawn_with_its_kappa_now(
    tmp_path: Path, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = drawn(monkeypatch)
    module = Mixture(kind)
    freeze = KappaFreezeCallback(num_tensors=3, include=["@experts"], experts="each")
    logger = TensorBoardLogger(tmp_path, name="logs")
    fit(tmp_path, module, freeze, KappaMonitor(tensors=["@experts"]), logger=logger)
    assert "kappa/experts" in events(Path(logger.log_dir)).Tags()["images"]
    assert Path(logger.log_dir, "kappa-experts.png").read_bytes().startswith(b"\x89PNG")
    assert len(seen) == 3  # at the start, after the epoch, and the file
    strips, trained = seen[-1]
    assert len(strips) == 2
    for depth, strip in enumerate(strips.values()):
        experts = module.net.layers[depth]["experts"]
        matrices = list(experts.up_proj) if kind is Fused else [expert["up_proj"].weight for expert in experts]
        assert strip == {at: pytest.approx(numpy_kappa(matrix), rel=1e-3) for at, matrix in enumerate(matrices)}
    assert len(trained) == 3
    assert {number for _, number in trained} == {
        int(name.rstrip("]").rpartition("[")[2] if kind is Fused else name.split(".experts.")[1].split(".")[0])
        for name in freeze.selected_names
    }


def test_the_profile_of_single_experts_serves_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    real = kappa_lightning.profile.profile.compute_rows

    def counting(weights: Any, *arguments: Any, **named: Any) -> Any:
        computed.extend(weight.name for weight in weights)
        yield from real(weights, *arguments, **named)

    monkeypatch.setattr(kappa_lightning.profile.profile, "compute_rows", counting)
    freeze = KappaFreezeCallback(num_tensors=1, include=["@experts"], experts="each")
    monitor = KappaMonitor(tensors=["@experts"])
    fit(tmp_path, Mixture(), freeze, monitor)
    (chosen,) = (name.partition("[")[0] for name in freeze.selected_names)
    assert [name for name in computed if "[" not in name] == [chosen]  # at the end of the epoch
    assert monitor.baseline[chosen] == pytest.approx(
        np.mean([freeze.profile[f"{chosen}[{expert}]"].kappa for expert in range(5)])
    )


def test_strips_survive_a_resume_and_files_need_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = drawn(monkeypatch)
    for name, epochs, path in (("first", 1, None), ("second", 2, tmp_path / "first" / "last.ckpt")):
        freeze = KappaFreezeCallback(num_tensors=1, include=["@experts"], experts="each")
        monitor, saver = KappaMonitor(tensors=["@experts"]), ModelCheckpoint(tmp_path / name, save_last=True)
        logger = CSVLogger(tmp_path, name=name)
        fit(tmp_path, Mixture(), freeze, monitor, saver, ckpt_path=path, max_epochs=epochs, logger=logger)
        assert Path(logger.log_dir, "kappa-experts.png").exists()
    (first, _), (second, trained) = seen
    moved = {(name, at) for name, strip in first.items() for at, kappa in strip.items() if second[name][at] != kappa}
    assert moved == trained
    assert len(trained) == 1


def test_an_infinite_kappa_is_left_out_of_the_picture_and_dots_mark_what_trains() -> None:
    strips = {"layers.0.experts.up": {0: 10.0, 1: float("inf")}, "layers.3.experts.up": {0: 100.0, 1: 1000.0}}
    figure = expert_strips(strips, {("layers.3.experts.up", 1)})
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), [[1.0, np.nan], [2.0, 3.0]])
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[1, 1]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "3"]
