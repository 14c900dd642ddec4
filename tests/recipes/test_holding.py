"""The anchor and walking back as choices of the recipes, and in the YAML of a LightningCLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from tiny import TinyNet, loader

from kappa_lightning import PretrainedAnchor, WalkBack
from recipes import new_task
from recipes.captioning import compare as captioning
from recipes.shared import comparison, small_models, sorting
from recipes.shared.pretraining import Schooling


@pytest.mark.slow
def test_the_new_task_recipe_holds_on_and_walks_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sorting, "SCHOOLING", Schooling(steps=20, facts=32, samples=0, lr=3e-3))
    made: list[Any] = []
    for name, kind in (("PretrainedAnchor", PretrainedAnchor), ("WalkBack", WalkBack)):

        def make(*arguments: Any, kind: Any = kind, **options: Any) -> Any:
            made.append(kind(*arguments, **options))
            return made[-1]

        monkeypatch.setattr(comparison, name, make)
    options = ["--method", "full", "--epochs", "1", "--steps-per-epoch", "2", "--batch-size", "8", "--test-size", "4"]
    (result,) = new_task.main(
        [*options, "--log-dir", str(tmp_path), "--accelerator", "cpu", "--anchor", "2", "--walk-back", "0.5"]
    )
    anchor, walk_back = made
    assert anchor.strength == 2.0
    assert anchor.references[0]["input_ids"].shape == (4, 32)  # text of its own
    assert result.retention == walk_back.report["chosen"]
    assert [point["alpha"] for point in walk_back.path] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--anchor", "-1"], "--anchor: -1.0 must be"), (["--walk-back", "1.5"], "--walk-back: 1.5 is not")],
)
@pytest.mark.parametrize("parse", [new_task.parse, captioning.parse])
def test_bad_values_are_usage_errors(
    capsys: pytest.CaptureFixture[str], parse: Any, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


class Known(TinyNet):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


def test_both_are_configured_in_a_yaml(tmp_path: Path) -> None:
    probe = {"class_path": "tiny.OldTask"}
    callbacks = [
        {"class_path": "kappa_lightning.ForgettingEval", "init_args": {"probes": {"old": probe}}},
        {
            "class_path": "kappa_lightning.PretrainedAnchor",
            "init_args": {"reference": "batch", "strength": 0.5, "max_divergence": 0.1, "exclude_target": True},
        },
        {
            "class_path": "kappa_lightning.WalkBack",
            "init_args": {"min_retention": 0.5, "monitor": "val_loss", "along": "role", "points": 2, "save": False},
        },
    ]
    trainer = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": callbacks,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": trainer}))
    cli = LightningCLI(Known, args=["fit", "--config", str(config)], save_config_callback=None)
    found = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert found["PretrainedAnchor"].source == "forward"
    assert found["WalkBack"].alpha is not None
