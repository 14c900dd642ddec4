"""Progress bars of long work inside the callbacks, beside each of Lightning's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tiny import Spy, TinyNet, fit, loader, make_trainer, scripted_probe

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor
from kappa_lightning.callbacks.progress import track


def _callbacks() -> list[Any]:
    return [KappaFreezeCallback(), KappaMonitor(), ForgettingEval({"words": scripted_probe([1.0] * 9)})]


@pytest.mark.parametrize("bar_first", [True, False])
def test_rich_bar_survives_and_keeps_no_task_of_ours(
    tmp_path: Path, bar_first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bar, tasks = RichProgressBar(), []

    def look(trainer: Any, module: Any) -> None:
        tasks.append([task.description for task in bar.progress.tasks])

    callbacks = [bar, *_callbacks()] if bar_first else [*_callbacks(), bar]
    trainer = make_trainer(tmp_path, *callbacks, Spy(on_train_epoch_end=look), enable_progress_bar=True, max_epochs=2)
    trainer.fit(TinyNet(), loader(), loader())
    assert trainer.global_step == 6
    assert len(tasks) == 2
    assert not [name for shown in tasks for name in shown if "Probe" in name or "Condition" in name]


def test_rich_bar_shows_our_work_as_one_more_line_while_it_runs(tmp_path: Path) -> None:
    bar = RichProgressBar()
    seen: list[list[tuple[str, float | None, float]]] = []

    def inside(trainer: Any, module: Any) -> None:
        for _ in track(trainer, range(3), total=3, description="Counting", unit="number"):
            ours = [task for task in bar.progress.tasks if task.description == "Counting"]
            seen.append([(task.description, task.total, task.completed) for task in ours])
        seen.append([task.description for task in bar.progress.tasks if task.description == "Counting"])

    fit(tmp_path, TinyNet(), bar, Spy(on_train_epoch_end=inside), enable_progress_bar=True)
    assert seen == [[("Counting", 3, float(done))] for done in range(3)] + [[]]


def test_rich_bar_loses_the_line_when_the_work_fails(tmp_path: Path) -> None:
    bar, left = RichProgressBar(), []

    def inside(trainer: Any, module: Any) -> None:
        def items() -> Any:
            yield 1
            raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            list(track(trainer, items(), total=2, description="Counting", unit="number"))
        left.extend(task.description for task in bar.progress.tasks)

    fit(tmp_path, TinyNet(), bar, Spy(on_train_epoch_end=inside), enable_progress_bar=True)
    assert left
    assert "Counting" not in left


def test_tqdm_bar_names_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, TinyNet(), TQDMProgressBar(), *_callbacks(), enable_progress_bar=True)
    shown = capsys.readouterr()
    assert "Condition numbers" in shown.err
    assert "0/3" in shown.err
    assert "Probe words" in shown.err


def test_nothing_is_shown_with_progress_bars_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, TinyNet(), *_callbacks())
    shown = capfd.readouterr()
    assert "Condition numbers" not in shown.out + shown.err
    assert "Probe words" not in shown.out + shown.err


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar, None])
@pytest.mark.parametrize("total", [3, None])
def test_track_gives_every_item_in_order(tmp_path: Path, bar: Any, total: int | None) -> None:
    found: list[int] = []

    def inside(trainer: Any, module: Any) -> None:
        found.extend(track(trainer, iter(range(3)), total=total, description="Counting", unit="number"))

    bars = [bar()] if bar else []
    spy = Spy(on_fit_start=inside, on_train_epoch_end=inside)
    fit(tmp_path, TinyNet(), *bars, spy, enable_progress_bar=bar is not None)
    assert found == [0, 1, 2] * 2


def test_disabled_bar_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar()
    spy = Spy(setup=lambda *_: bar.disable())
    fit(tmp_path, TinyNet(), spy, bar, KappaFreezeCallback(), enable_progress_bar=True)
    assert "Condition numbers" not in capsys.readouterr().err
