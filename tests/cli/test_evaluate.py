"""``kappa-lightning evaluate`` on two tiny language models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from words import model, tokenizer

from kappa_lightning.callbacks.trained_only import marks_of, save_trained
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


def _figures(models: Path, trained: str, *probe: str) -> dict[str, float]:
    out = models / "out.json"
    given = ["--tokens", "16", "--out", str(out), "--device", "cpu"]
    assert main(["evaluate", str(models / "base"), str(models / trained), *given, *probe]) == 0
    figures: dict[str, float] = next(iter(json.loads(out.read_text()).values()))
    return figures


def test_adapter_folder_and_file_of_what_trained(models: Path) -> None:
    blocks = [{"input_ids": b[None]} for b in tokenizer()(TEXT, return_tensors="pt")["input_ids"][0].split(16)]
    probe = ("--probe", f"text=perplexity:{models / 'old.txt'}")
    target = next(name for name, layer in model(0).named_modules() if "q_proj" in name or "c_attn" in name)
    adapted = get_peft_model(model(0), LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    adapted.save_pretrained(models / "adapter")
    found = _figures(models, "adapter", *probe)
    assert found["after"] == pytest.approx(evaluate_probe(adapted, PerplexityProbe(blocks)), rel=1e-5)
    assert found["after"] != pytest.approx(found["before"], rel=1e-5)

    module, name = model(0), next(iter(dict(model(0).named_parameters())))
    marks = marks_of(module)
    with torch.no_grad():
        module.get_parameter(name).add_(0.5 * torch.randn_like(module.get_parameter(name)))
    save_trained(models / "some.safetensors", {name: module.get_parameter(name).detach()}, marks)
    found = _figures(models, "some.safetensors", *probe)
    assert found["after"] == pytest.approx(evaluate_probe(module, PerplexityProbe(blocks)), rel=1e-5)
    assert found["after"] != pytest.approx(found["before"], rel=1e-5)


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_task_of_a_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(models / "cache"))
    choices = ["a", "b", "c", "d"]
    questions = ["a is", "b is", "c is", "d is", "what is", "answer is"]
    # The base's own answers, so that it has all of the capability.
    ids = {word: tokenizer()(word)["input_ids"][0] for word in choices}
    base, rows, right = model(0).eval(), [], 0
    for question in questions:
        inputs = tokenizer()(question, return_tensors="pt")["input_ids"]
        golds = [int(each(inputs).logits[0, -1][list(ids.values())].argmax()) for each in (base, model(1).eval())]
        rows.append(json.dumps({"q": question, "choices": choices, "gold": golds[0]}))
        right += golds[0] == golds[1]
    (models / "data.jsonl").write_text("\n".join(rows))
    (models / "tiny.yaml").write_text(TASK.format(data=models / "data.jsonl"))
    found = _figures(models, "trained", "--probe", "task=lm_eval:tiny_choice", "--tasks", str(models))
    assert (found["before"], found["after"]) == (1.0, pytest.approx(right / 6))
