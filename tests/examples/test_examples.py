"""Every file in examples/ runs as a user runs it, is short, stands by itself, and does what it says."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kappa_lightning.selection import CRITERIA

FOLDER = Path(__file__).parents[2] / "examples"
FILES = sorted(file for file in FOLDER.glob("*.py") if file.name != "__init__.py")


@pytest.fixture
def main_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The main function of an example, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    before, threads = dict(CRITERIA), torch.get_num_threads()
    # The examples are so small that a second thread only waits.
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()
    torch.set_num_threads(threads)
    for name in CRITERIA.keys() - before:
        del CRITERIA[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_can_be_copied(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported.isdisjoint({"recipes", "benchmarks", "examples", "tests"})
    assert f"python examples/{file.name}" in (ast.get_docstring(ast.parse(source)) or "").replace("\n", " ")


def test_freeze_keeps_most_of_what_the_network_knew_and_learns_the_new_task(
    main_of: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    freeze, forgetting = main_of("freeze")
    assert set(freeze.trained_names) >= {"head.weight", "head.bias"}
    assert freeze.selected_names == [min(freeze.profile, key=lambda row: row.kappa).name]
    retentions = [figures["forgetting/retention"] for figures in forgetting.history]
    assert retentions[0] == 1.0
    assert len(retentions) == 9
    learned = re.search(r"new task: ([\d.]+) right", capsys.readouterr().out)
    assert learned is not None
    assert float(learned[1]) > 0.5
    assert list((tmp_path / "runs" / "freeze").rglob("events*"))


def test_own_probe_measures_with_a_metric_of_torchmetrics_and_one_of_the_example(main_of: Any) -> None:
    forgetting = main_of("own_probe")
    assert set(forgetting.baseline) == {"error", "peak"}
    last = forgetting.history[-1]
    # Of the error lower is better, so that retention is the old one over the new one.
    assert last["forgetting/error/retention"] == pytest.approx(
        forgetting.baseline["error"] / last["forgetting/error/mean_squared_error"]
    )
    assert last["forgetting/peak/retention"] == pytest.approx(
        last["forgetting/peak/peak_found"] / forgetting.baseline["peak"]
    )
    assert last["forgetting/retention"] < 1


def test_lora_puts_adapters_on_half_of_the_matrices_and_learns(main_of: Any) -> None:
    targets, forgetting, loss = main_of("lora")
    assert len(targets["target_modules"]) == 7
    assert loss < 0.5
    assert forgetting.history[0]["forgetting/agreement/retention"] == 1.0
    assert 0 < forgetting.history[-1]["forgetting/agreement/retention"] < 1


def test_own_criterion_chooses_what_trains(main_of: Any) -> None:
    profile, freeze = main_of("own_criterion")

    def rms(row: Any) -> float:
        return float(row.frobenius_norm) / row.num_parameters**0.5

    assert freeze.trained_names == [min(profile, key=rms).name]
    assert profile.select(num_tensors=1, criterion="kappa_but_last_layer_first") == ["net.4.weight"]


@pytest.mark.slow
def test_ddp_gives_both_processes_the_same_selection_and_retention(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / "ddp.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"rank (\d): trained ([\w., ]+); retention ([\d.]+)", done.stdout)
    assert sorted(line[0] for line in lines) == ["0", "1"], done.stdout
    assert lines[0][1:] == lines[1][1:]
    assert lines[0][1].endswith("head.weight, head.bias")


def test_retention_tells_lost_from_out_of_line_and_the_way_back(main_of: Any, tmp_path: Path) -> None:
    often, seldom, difference = main_of("retention")
    assert [record["step"] for record in often.history] == [0, 8, 16, 24, 32]
    last = seldom.history[-1]
    assert last["forgetting/dear/retention_high"] < 0.2
    # The head alone has moved: what it reads is all there.
    assert last["forgetting/dear/recoverable"] > 0.9
    assert difference == 0
    assert list((tmp_path / "trained").glob("*.safetensors"))


@pytest.mark.slow
def test_language_probes_stop_a_run_that_forgets(main_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    forgetting = main_of("language_probes")
    first, last = forgetting.history[0], forgetting.history[-1]
    assert first["forgetting/written/exact_match"] > 0.8
    assert last["step"] < 40
    assert min(last[f"forgetting/{name}/retention_low"] for name in forgetting.probes) < 0.5
    assert "| 0 1 2 | 3 4 |" in capsys.readouterr().out


def test_site_shows_every_example() -> None:
    page = (FOLDER.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert [name for name in (file.name for file in FILES) if f'\n--8<-- "examples/{name}"\n' not in page] == []
