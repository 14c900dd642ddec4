"""A language model behind a vision tower: the same on text, and another on pictures."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.forgetting import sight
from benchmarks.forgetting.sight import IMAGE, PATCHES, Pictures, Seer, collate
from recipes.shared.shapes import words
from recipes.shared.world import word_tokenizer


@pytest.fixture
def folder(tmp_path):
    texts = [*words(), "one two three circles squares triangles crosses at the", "user assistant Describe picture . ,"]
    tokenizer = word_tokenizer(texts, special=[IMAGE, "<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_text_is_read_as_before_and_pictures_are_seen(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sight, "EYE_STEPS", 2)
    eyes = tmp_path / "eyes.pt"
    module = Seer(folder, eyes, lr=1e-3).eval()
    assert {name.split(".")[2] for name, p in module.named_parameters() if not p.requires_grad} == {"vision_tower"}
    text = torch.tensor([[3, 4, 5, 6]])
    plain = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(module(text), plain(text).logits)

    data = Pictures(sight.tokenizer_of(folder), learned=4, held_out=4, batch_size=4, seed=0)
    batch = next(iter(data.val_dataloader()))
    assert (batch["input_ids"] == module.model.config.image_token_index).sum(1).tolist() == [PATCHES] * 4
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad():
        assert module.loss(batch)[0] != module.loss(other)[0]
        again = Seer(folder, eyes, lr=1e-3).eval()
        assert torch.equal(again.loss(batch)[0], module.loss(batch)[0])


def test_validation_is_the_same_for_all_seeds_and_learning_is_not(folder):
    tokenizer = sight.tokenizer_of(folder)
    one, other = (Pictures(tokenizer, learned=4, held_out=4, batch_size=4, seed=seed) for seed in (0, 1))
    assert torch.equal(collate(one.held_out)["pixel_values"], collate(other.held_out)["pixel_values"])
    assert not torch.equal(collate(one.learned)["pixel_values"], collate(other.learned)["pixel_values"])
