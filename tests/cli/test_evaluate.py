"""``kappa-lightning evaluate`` on two tiny language models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from words import model, tokenizer

from kappa_lightning.cli import main
from kappa_lightning.evaluation import evaluate_probe
from kappa_lightning.probes import PerplexityProbe

TEXT = "what is a : answer b c d is what a b " * 12


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "trained")):
        model(seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    state = {f"model.{name}": value for name, value in model(1).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "trained.ckpt")
    (tmp_path / "old.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("trained", ["trained", "trained.ckpt"])
def test_compares_two_checkpoints(models: Path, trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    probe = ["--probe", f"text=perplexity:{models / 'old.txt'}", "--tokens", "16", "--out", str(models / "out.json")]
    assert main(["evaluate", str(models / "base"), str(models / trained), "--device", "cpu", *probe]) == 0
    figures = json.loads((models / "out.json").read_text())["text"]
    blocks = [block[None] for block in tokenizer()(TEXT, return_tensors="pt")["input_ids"][0].split(16)]
    expected = [evaluate_probe(model(seed), PerplexityProbe([{"input_ids": b} for b in blocks])) for seed in (0, 1)]
    assert [figures["before"], figures["after"]] == pytest.approx(expected, rel=1e-5)
    assert figures["retention"] == pytest.approx(expected[0] / expected[1], rel=1e-5)
    assert figures["retention_low"] <= figures["retention"] <= figures["retention_high"]
    assert math.isfinite(figures["retention_low"])
    assert "perplexity" in capsys.readouterr().out


def test_own_probe_and_bad_input(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "mine.py").write_text(
        "from kappa_lightning import PerplexityProbe\n"
        "def probe(tokenizer):\n"
        "    return PerplexityProbe([dict(tokenizer('a is b', return_tensors='pt')) for _ in range(2)])\n"
    )
    base = ["evaluate", str(models / "base"), str(models / "trained"), "--device", "cpu", "--probe"]
    assert main([*base, f"mine=python:{models / 'mine.py'}"]) == 0
    (models / "mine.py").write_text("def probe(tokenizer): return 1\n")
    assert main([*base, f"mine=python:{models / 'mine.py'}"]) == 1
    assert "returned a int, not a Probe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*base, "text=unknown:x"])
    assert "NAME=perplexity:FILE.txt" in capsys.readouterr().err
