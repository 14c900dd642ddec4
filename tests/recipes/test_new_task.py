import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recipes import new_task
from recipes.new_task import read_answers
from recipes.shared import small_models, sorting
from recipes.shared.encoding import Encoder, Sample
from recipes.shared.module import GenerativeModule
from recipes.shared.pretraining import Schooling
from recipes.shared.probes import WorldAgreement
from recipes.shared.small_llama import small_llama
from recipes.shared.sorting import sorting_samples
from recipes.shared.world import NUMBERS, facts, word_tokenizer

VALUES = {word: value for value, word in enumerate(NUMBERS)}


def test_answers_are_sorted_and_no_three_numbers_are_in_both_parts():
    learned, tested = sorting_samples()
    for sample in [*learned, *tested]:
        asked = [VALUES[word] for word in sample.prompt.split()[1:-1]]
        assert [VALUES[word] for word in sample.answer.split()] == sorted(asked)
    assert not {sample.answer for sample in learned} & {sample.answer for sample in tested}
    assert 100 < len(tested) < 300


def test_facts_are_true_where_arithmetic_can_tell():
    checked = 0
    for fact in facts():
        tokens = fact.prompt.split()
        if tokens[1] in ("plus", "minus") and fact.answer in VALUES:
            first, second = VALUES[tokens[0]], VALUES[tokens[2]]
            assert VALUES[fact.answer] == (first + second if tokens[1] == "plus" else first - second)
            checked += 1
        elif tokens[1] in ("greater", "smaller"):
            pair = [VALUES[tokens[3]], VALUES[tokens[5]]]
            assert VALUES[fact.answer] == (max(pair) if tokens[1] == "greater" else min(pair))
            checked += 1
    assert checked > 300
    assert len({fact.prompt for fact in facts()}) == len(facts())


def test_text_answers_are_all_that_is_labeled():
    encoder = Encoder(word_tokenizer(["sort two one zero :"]))
    sample = Sample("sort two one :", "one two")
    short = Sample("sort one :", "one")
    batch = encoder([sample, short])
    tokens = [encoder.tokenizer.convert_ids_to_tokens(row.tolist()) for row in batch["inputs"]["input_ids"]]
    assert tokens == [
        ["sort", "two", "one", ":", "one", "two", "</s>"],
        ["<pad>", "sort", "one", ":", "one", "</s>", "<pad>"],
    ]
    labeled = batch["inputs"]["labels"] != -100
    assert labeled.tolist() == [[False] * 4 + [True] * 3, [False] * 4 + [True] * 2 + [False]]


@pytest.mark.parametrize("line", ["no json", '{"prompt": "a"}', '{"prompt": "a", "answer": 3}'])
def test_line_of_another_form_is_named(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b"}) + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_answers(file)


@pytest.mark.slow
def test_a_short_run_of_every_method_gives_its_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sorting, "SCHOOLING", Schooling(steps=40, facts=32, samples=0, lr=3e-3))
    options = ["--epochs", "1", "--steps-per-epoch", "2", "--batch-size", "8", "--test-size", "4"]
    results = new_task.main([*options, "--log-dir", str(tmp_path / "runs"), "--accelerator", "cpu"])
    assert [result.method for result in results] == ["full", "kappa", "lora", "kappa-lora"]
    full, kappa, lora, kappa_lora = results
    assert kappa.trainable < full.trainable / 2
    assert kappa_lora.trainable < lora.trainable < full.trainable
    assert kappa.memory < full.memory
    for result in results:
        assert 0 < result.retention["agreement"] < 1
    assert "kappa-lora" in capsys.readouterr().out
    (folder,) = (tmp_path / "cache").iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert small_models.locate("small-llama") == str(folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_small_model_depends_on_its_seed_alone(tmp_path):
    schooling = Schooling(steps=2, facts=4, samples=0)
    folders = [small_llama(tmp_path / name, [], schooling) for name in ("one", "other")]
    torch.manual_seed(9)
    folders.append(small_llama(tmp_path / "third", [], schooling))
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    assert len({folder.name for folder in folders}) == 1


def test_padding_does_not_move_positions_that_are_learned(tmp_path):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["sort two one zero :"])
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = GenerativeModule(str(tmp_path), images=False).eval()
    samples = [Sample("sort two one zero :", "one two"), Sample("sort :", "one")]
    together = module.loss(module.encoder(samples))
    apart = [module.loss(module.encoder([sample])) for sample in samples]
    # Three and two tokens, end tokens included.
    torch.testing.assert_close(together, (3 * apart[0] + 2 * apart[1]) / 5)


def test_single_experts_of_the_small_mixture_train(tmp_path, monkeypatch):
    monkeypatch.setattr(small_models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sorting, "SCHOOLING", Schooling(steps=2, facts=4, samples=0, lr=3e-3))
    # After two steps it knows no fact whose retention could be measured.
    agreement = lambda: {"agreement": WorldAgreement("small-moe", images=False)}  # noqa: E731
    monkeypatch.setattr(new_task, "probes_of", lambda *_: (agreement, {"agreement": "agreement"}))
    options = ["--epochs", "1", "--steps-per-epoch", "1", "--batch-size", "4", "--test-size", "2"]
    options += ["--model", "small-moe", "--method", "kappa-experts", "--log-dir", str(tmp_path / "runs")]
    (result,) = new_task.main([*options, "--accelerator", "cpu", "--max-params", "0.25"])
    assert result.method == "kappa-experts"
    # A quarter of 3 × 8 gate-and-up and as many down projections, which are half as large.
    assert result.trainable % (128 * 128) == 0
    assert 12 <= result.trainable / (128 * 128) <= 24
    (rows,) = (tmp_path / "runs").glob("kappa-experts/*")
    assert any(rows.iterdir())
