"""KappaTune in transformers' Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from kappa_lightning import KappaProfile, PerplexityProbe
from kappa_lightning.integrations.huggingface import KappaFreeze, Retention


def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def samples(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(count)
    return [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(3, 32, (count, 8), generator=generator)]


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(str(folder), **{**options, **changes})


def probe() -> PerplexityProbe:
    tokens = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(9))
    return PerplexityProbe([{"input_ids": tokens, "labels": tokens}])


def test_trainer_moves_the_tensors_of_low_kappa_and_logs_retention(tmp_path):
    net = model()
    freezing = KappaFreeze(num_tensors=3, exclude=["*embed*", "lm_head*"])
    trainer = Trainer(
        net, arguments(tmp_path), train_dataset=samples(16), eval_dataset=samples(4), callbacks=[freezing]
    )
    retention = Retention(trainer, {"text": probe()})
    trainer.add_callback(retention)
    before = copy.deepcopy(net.state_dict())
    trainer.train()
    candidates = KappaProfile.from_model(model(), exclude=["*embed*", "lm_head*"], progress=False)
    assert freezing.frozen.selected_names == candidates.select(num_tensors=3)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(freezing.frozen.trained_names) == set(freezing.frozen.selected_names)
    logged = [entry for entry in trainer.state.log_history if "eval_text_retention" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    assert logged[0]["eval_text_retention"] == 1.0
    last = logged[-1]
    assert last["eval_text_retention"] == pytest.approx(retention.baseline["text"] / last["eval_text_perplexity"])
    assert last["eval_retention"] == last["eval_text_retention"] != 1.0


def test_run_with_retention_is_bit_identical_to_one_without(tmp_path):
    results = []
    for measured in (False, True):
        net = model()
        trainer = Trainer(net, arguments(tmp_path), train_dataset=samples(16), eval_dataset=samples(4))
        if measured:
            trainer.add_callback(Retention(trainer, {"text": probe()}))
        trainer.train()
        results.append(net.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_retention_can_be_what_the_best_model_is_chosen_by(tmp_path):
    changes = {
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "text_retention",
        "greater_is_better": True,
    }
    trainer = Trainer(model(), arguments(tmp_path, **changes), train_dataset=samples(16), eval_dataset=samples(4))
    trainer.add_callback(Retention(trainer, {"text": probe()}))
    trainer.train()
    figures = [
        e["eval_text_retention"]
        for e in trainer.state.log_history
        if e.get("step", 0) > 0 and "eval_text_retention" in e
    ]
    assert trainer.state.best_metric == pytest.approx(max(figures))


def test_callback_that_comes_too_late_says_so(tmp_path):
    trainer = Trainer(model(), arguments(tmp_path), train_dataset=samples(8), eval_dataset=samples(4))
    trainer.add_callback(KappaFreeze(num_tensors=1))
    with pytest.raises(ValueError, match="when its Trainer was made"):
        trainer.train()


def test_wrong_argument_names_it():
    with pytest.raises(ValueError, match="probes is empty"):
        Retention(None, {})


def test_sft_trainer_of_trl_takes_the_same_callbacks(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    net = model()
    freezing = KappaFreeze(num_tensors=2, exclude=["*embed*", "lm_head*"])
    rows = [{"input_ids": tokens["input_ids"].tolist()} for tokens in samples(8)]
    options = arguments(tmp_path, max_steps=2, eval_strategy="no").to_dict()
    wanted = ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "report_to", "use_cpu", "seed")
    config = trl.SFTConfig(
        **{key: options[key] for key in wanted},
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    words = tokenizer()
    trainer = trl.SFTTrainer(
        net, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=words, callbacks=[freezing]
    )
    retention = Retention(trainer, {"text": probe()})
    trainer.add_callback(retention)
    before = copy.deepcopy(net.state_dict())
    trainer.train()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(freezing.frozen.selected_names)
    assert len(moved) == 2
    assert retention.baseline.keys() == {"text"}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One that knows the numbers of the tiny model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({str(number): number for number in range(32)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", pad_token="0", bos_token="1", eos_token="2"
    )
