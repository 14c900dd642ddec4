"""Text that is written after a prompt, and tasks of lm-eval, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.utils.data import DataLoader
from torchmetrics.text import CharErrorRate
from words import WORDS, model, tokenizer

from kappa_lightning import ForgettingEval, GenerationProbe, LMEvalProbe
from kappa_lightning.evaluation import Circumstances, measure_probe
from kappa_lightning.probes.metrics import RougeL


def _prompts(references: list[str]) -> dict[str, Any]:
    return {**tokenizer()(["a is", "what is b"], return_tensors="pt", padding=True), "references": references}


def _greedy(module: Any, prompt: str, count: int) -> str:
    """By hand, one token after the other."""
    ids = [WORDS.index(word) for word in prompt.split()]
    for _ in range(count):
        ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return " ".join(WORDS[token] for token in ids[len(prompt.split()) :] if token > 1)


def test_text_is_greedy_and_the_models_own_settings_stay() -> None:
    module = model().eval()
    module.generation_config.do_sample, module.generation_config.temperature = True, 9.0
    before = module.generation_config.to_dict()
    wanted = [_greedy(module, "a is", 5), "something else"]
    batch = _prompts(wanted)
    batch.pop("token_type_ids", None)
    probe = GenerationProbe([batch], tokenizer=tokenizer(), max_new_tokens=5)
    probe.begin_baseline()
    measured = measure_probe(module, probe, Circumstances())
    assert measured.value == 0.5
    assert len(measured.items) == 2
    assert module.generation_config.to_dict() == before
    assert f"| a is | {wanted[0]} | {wanted[0]} | {wanted[0]} |" in probe.report()
    with torch.no_grad():
        module.lm_head.weight.neg_()
    measure_probe(module, probe, Circumstances())
    again = GenerationProbe([batch], tokenizer=tokenizer(), max_new_tokens=5)
    again.load_state_dict(probe.state_dict())
    measure_probe(module, again, Circumstances())
    row = next(line for line in again.report().splitlines() if line.startswith("| a is |"))
    assert row == f"| a is | {wanted[0]} | {wanted[0]} | {_greedy(module, 'a is', 5)} |"


def test_any_text_metric_and_its_key() -> None:
    batch = _prompts(["a", "b"])
    batch.pop("token_type_ids", None)
    probe = GenerationProbe([batch], CharErrorRate(), tokenizer=tokenizer(), max_new_tokens=2)
    assert not probe.higher_is_better
    assert measure_probe(model().eval(), probe, Circumstances()).value > 0
    with pytest.raises(TypeError, match="list of references"):
        probe.update(model(), {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="metric='bleu' is unknown"):
        GenerationProbe([batch], "bleu", tokenizer=tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        GenerationProbe([batch], tokenizer=tokenizer(), max_new_tokens=0)


@pytest.mark.parametrize(("one", "other"), [("the cat sat on the mat", "The cat, on a mat!"), ("a b", "c"), ("", "a")])
def test_rouge_is_that_of_google(one: str, other: str) -> None:
    expected = RougeScorer(["rougeL"]).score(other, one)["rougeL"].fmeasure
    assert RougeL().of_one(one, other) == pytest.approx(expected)


TASK = """task: tiny_choice
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
QUESTIONS = ["a is", "b is", "c is", "d is", "what is", "answer is"]
CHOICES = ["a", "b", "c", "d"]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"q": question, "choices": CHOICES, "gold": place % 4} for place, question in enumerate(QUESTIONS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path


@pytest.mark.slow
def test_lm_eval_scores_the_live_model(tasks: Path) -> None:
    module = model().eval()
    correct = []
    for place, question in enumerate(QUESTIONS[:5]):
        ids = torch.tensor([[WORDS.index(word) for word in question.split()]])
        scores = module(ids).logits[0, -1][[WORDS.index(choice) for choice in CHOICES]]
        correct.append(int(scores.argmax()) == place % 4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe = LMEvalProbe(["tiny_choice"], tokenizer=tokenizer(), limit=5, include_path=tasks)
    measured = measure_probe(module.train(), probe, Circumstances())
    assert measured.value == pytest.approx(sum(correct) / 5)
    assert len(measured.items) == 5
    assert probe.chance == 0.25
    assert probe.results["tiny_choice"]["acc,none"] == pytest.approx(sum(correct) / 5)
    assert "acc_stderr,none" in probe.results["tiny_choice"]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module.training


@pytest.mark.slow
def test_lm_eval_tasks_that_are_not_there_are_refused(tasks: Path) -> None:
    with pytest.raises(ValueError, match="knows no task 'no_such'"):
        LMEvalProbe(["no_such"], tokenizer=tokenizer(), include_path=tasks)
    probe = LMEvalProbe(["tiny_choice"], tokenizer=tokenizer(), metric="bleu", include_path=tasks)
    with pytest.raises(ValueError, match=r"no number 'bleu' .*\['acc'\]"):
        measure_probe(model(), probe, Circumstances())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kept"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_lm_eval_runs_under_the_trainers_precision(
    tasks: Path, tmp_path: Path, precision: Any, kept: torch.dtype
) -> None:
    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()
            self.model.lm_head.register_forward_hook(lambda layer, inputs, output: note(output))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(batch).logits.float().square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    # In a file, since an evaluation puts back what hooks collect.
    seen = tmp_path / "seen"

    def note(output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            with seen.open("a") as file:
                print(output.dtype, file=file)

    probe = LMEvalProbe(["tiny_choice"], tokenizer=tokenizer(), limit=5, include_path=tasks, chance=1e-9)
    callback = ForgettingEval({"tasks": probe})
    trainer = pl.Trainer(
        precision=precision, callbacks=[callback], max_steps=1, accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Holder(), DataLoader(torch.ones(2, 3, dtype=torch.long)))
    assert len(callback.history) == 2
    assert set(seen.read_text().split()) == {str(kept)}
