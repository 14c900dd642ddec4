"""What goes to which logger: pictures, texts, layouts, and few cards for many tensors."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from tiny import Bank, TinyNet, events, fit, scripted_probe
from torch import nn

from kappa_lightning import ForgettingEval, KappaMonitor
from kappa_lightning.callbacks.drift import quantiles_by_role


class _Stack(Bank):
    """45 layers of one role."""

    def __init__(self) -> None:
        super().__init__(**{f"layer{n}": (3, 2.0 + n) for n in range(45)})
        self.h = nn.ModuleList(self.layers())
        for n in range(45):
            delattr(self, f"layer{n}")

    def layers(self) -> list[nn.Linear]:
        return list(self.h) if "h" in self._modules else super().layers()  # type: ignore[arg-type]


class _WithText(ForgettingEval):
    def __init__(self) -> None:
        super().__init__({"a": scripted_probe([1.0, 0.9])})
        self.probes["a"].report = lambda: "| now |"  # type: ignore[method-assign]


def test_few_cards_for_many_tensors_and_all_of_them_in_the_csv(tmp_path: Path) -> None:
    names = [f"h.{n}" for n in range(45)]
    loggers = [TensorBoardLogger(tmp_path, "", version=""), CSVLogger(tmp_path, "csv", version="")]
    monitor = KappaMonitor()
    fit(tmp_path, _Stack(), monitor, logger=loggers)
    tags = events(tmp_path).Tags()
    drifts = [tag for tag in tags["scalars"] if tag.startswith("kappa_drift/h.")]
    assert len(drifts) == 5
    kappas = list(monitor.history[-1]["kappa"].values())
    role = [event.value for event in events(tmp_path).Scalars("kappa/by_role/h.*.weight/p90")]
    assert role[-1] == pytest.approx(np.quantile(kappas, 0.9), rel=1e-5)
    assert tags["images"] == ["kappa/drift", "kappa/drift_map"]
    with open(tmp_path / "csv" / "metrics.csv") as file:
        columns = next(csv.reader(file))
    assert {f"kappa/{name}.weight" for name in names} <= set(columns)
    assert len(monitor.history[-1]["kappa"]) == 45


def test_all_scalars_on_request(tmp_path: Path) -> None:
    module = Bank(**{f"layer{n}": (2, 2.0 + n) for n in range(45)})
    fit(tmp_path, module, KappaMonitor(scalars="all"), logger=TensorBoardLogger(tmp_path, "", version=""))
    assert sum(tag.startswith("kappa/layer") for tag in events(tmp_path).Tags()["scalars"]) == 45
    with pytest.raises(ValueError, match='scalars=3 must be "auto" or "all"'):
        KappaMonitor(scalars=3)  # type: ignore[arg-type]


def test_quantiles_are_those_of_numpy() -> None:
    values = {f"h.{n}.a.weight": float(n * n) for n in range(7)}
    found = quantiles_by_role(values, "kappa")
    expected = np.quantile(list(values.values()), [0.1, 0.5, 0.9])
    assert [found[f"kappa/by_role/h.*.a.weight/p{p}"] for p in (10, 50, 90)] == pytest.approx(expected.tolist())


def _lines(charts: dict[str, Any]) -> list[tuple[str, str]]:
    """Each chart of lines with all that it shows, as one regular expression."""
    return [(title, "|".join(chart.multiline.tag)) for title, chart in charts.items() if chart.multiline.tag]


def test_story_layout_and_file(tmp_path: Path) -> None:
    forgetting = ForgettingEval({"a": scripted_probe([1.0, 0.9, 0.8])}, min_retention=0.5)
    logger = TensorBoardLogger(tmp_path, "", version="")
    fit(tmp_path, TinyNet(), forgetting, KappaMonitor(), logger=logger, max_epochs=2)
    log = events(tmp_path)
    assert [event.step for event in log.Images("forgetting/story")] == [3, 6]
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    content = log.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    assert {category.title for category in layout.category} == {"forgetting", "kappa"}
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    scalars = log.Tags()["scalars"]
    shown = {t: [tag for tag in scalars if re.search(line, tag)] for t, line in _lines(charts)}
    # Not the ends of the interval, whose tags begin alike.
    assert not re.search(dict(_lines(charts))["retention"], "forgetting/a/retention_low")
    assert sorted(shown["retention"]) == ["forgetting/a/retention", "forgetting/retention"]
    assert sorted(shown["drift of the tensors"]) == [
        tag for tag in sorted(scalars) if re.match("kappa_drift/.*weight", tag)
    ]
    assert {value for chart in charts["retention of a"].margin.series for value in (chart.value, chart.lower)} == {
        "forgetting/a/retention", "forgetting/a/retention_low",
    }  # fmt: skip
    steps = [step for step, _ in forgetting.story.losses()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_no_file_without_a_logger_or_if_not_wanted(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet(), ForgettingEval({"a": scripted_probe([1.0, 0.9])}))
    logger = CSVLogger(tmp_path, "csv", version="")
    fit(tmp_path, TinyNet(), ForgettingEval({"a": scripted_probe([1.0, 0.9])}, figures=False), logger=logger)
    assert list(tmp_path.rglob("*.png")) == []


def test_wandb_offline_takes_pictures_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger: Any = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, TinyNet(), _WithText(), KappaMonitor(), logger=logger)
    logger.experiment.finish()
    assert list(tmp_path.rglob("media/images/forgetting/story*.png"))
    (table, *_) = tmp_path.rglob("media/table/forgetting/a/samples*.json")
    assert json.loads(table.read_text())["data"] == [["| now |"]]


def test_mlflow_offline_takes_pictures_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger: Any = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'runs'}")
    fit(tmp_path, TinyNet(), _WithText(), KappaMonitor(), logger=logger)
    assert list(tmp_path.rglob("artifacts/forgetting/story/step=3.png"))
    assert next(tmp_path.rglob("artifacts/forgetting/a/samples/step=3.md")).read_text() == "| now |"


def test_comet_offline_takes_pictures_texts_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comet_ml = pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_INTERNAL_SENTRY_DSN", "")  # to which it would report this run
    logger: Any = CometLogger(online=False, offline_directory=str(tmp_path), project="tiny")
    # Of a class whose file is there when end() returns.
    logger._experiment = comet_ml.OfflineExperiment(
        offline_directory=str(tmp_path), project_name="tiny", disabled=False, display_summary_level=0, log_code=False,
        log_env_details=False, auto_output_logging=False,
    )  # fmt: skip
    fit(tmp_path, TinyNet(), _WithText(), KappaMonitor(), logger=logger)
    logger._experiment.end()
    (path,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    messages = content["messages.json"].decode()
    for tag in ("forgetting/story", "kappa/drift", "forgetting/retention", "kappa/median"):
        assert tag in messages, tag
    assert any(b"| now |" in part for part in content.values())


def test_csv_rows_of_the_callbacks_carry_the_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    forgetting, monitor = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])}), KappaMonitor()
    fit(tmp_path, TinyNet(), forgetting, monitor, logger=logger, max_epochs=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for tag in ("forgetting/retention", "kappa/median"):
        found = [(row["epoch"], row["step"]) for row in rows if row[tag]]
        assert found == [("0", "0"), ("0", "3"), ("1", "6")]
