import numpy as np
import pytest
import torch
from tiny import random_state
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kappa_lightning.probes.generated import generate_text, load_text, save_text, split

VOCABULARY = 11


class Bigrams(nn.Module):
    """The logits of the token after t are row t; no cache, ids by position."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids):
        return self.rows[ids]


def llama(**options):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=4, eos_token_id=4,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


class WithoutCache(nn.Module):
    """A model that is asked for the whole text every time."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask).logits


def test_tokens_follow_the_distribution_of_the_model():
    model = Bigrams()
    text = generate_text(model, num_sequences=4000, num_tokens=3, batch_size=4000, begin_token=5)["input_ids"]
    for place in (1, 2):
        expected = model.rows[5].softmax(-1) if place == 1 else model.rows[5].softmax(-1) @ model.rows.softmax(-1)
        found = torch.bincount(text[:, place], minlength=VOCABULARY) / 4000
        # Four standard errors of a frequency.
        np.testing.assert_allclose(found, expected.detach(), atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cache_changes_nothing_of_the_text(make):
    model = make()
    options = {"num_sequences": 6, "num_tokens": 12, "batch_size": 3, "begin_token": 1}
    assert torch.equal(
        generate_text(model, **options)["input_ids"], generate_text(WithoutCache(model), **options)["input_ids"]
    )


def test_cache_spares_the_tokens_so_far():
    model, widths = llama(), []
    model.model.embed_tokens.register_forward_hook(lambda layer, inputs, output: widths.append(inputs[0].shape[1]))
    generate_text(model, num_sequences=2, num_tokens=9)
    assert widths == [1] * 8


def test_text_depends_on_the_seed_and_not_on_what_was_drawn_before():
    model = llama()
    first = generate_text(model, num_sequences=4, num_tokens=10, seed=1)["input_ids"]
    torch.rand(3)
    assert torch.equal(first, generate_text(model, num_sequences=4, num_tokens=10, seed=1)["input_ids"])
    assert not torch.equal(first, generate_text(model, num_sequences=4, num_tokens=10, seed=2)["input_ids"])


def test_text_ends_where_the_model_ends_it():
    text = generate_text(llama(), num_sequences=40, num_tokens=20)
    ids, mask = text["input_ids"], text["attention_mask"]
    assert ids[:, 0].tolist() == [1] * 40
    ended = 0
    for row, counts in zip(ids.tolist(), mask.tolist(), strict=True):
        end = row.index(2) if 2 in row else 20
        ended += end < 20
        assert row[end:] == [2] * (20 - end)
        assert counts == [1] * end + [0] * (20 - end)
    assert 0 < ended < 40


def test_begin_token_that_is_the_end_token_ends_nothing_at_the_beginning():
    text = generate_text(gpt2(), num_sequences=8, num_tokens=6)
    assert text["input_ids"][:, 0].tolist() == [4] * 8
    assert text["attention_mask"][:, 0].tolist() == [1] * 8


def test_nothing_of_the_model_or_the_random_numbers_is_touched():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, settings, before = [m.training for m in model.modules()], model.generation_config.to_dict(), random_state()
    generate_text(model, num_sequences=2, num_tokens=5)
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert random_state() == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_settings_with_which_the_model_would_chat_have_no_say():
    model = llama()
    plain = generate_text(model, num_sequences=4, num_tokens=10)["input_ids"]
    model.generation_config.temperature, model.generation_config.top_k = 0.01, 1
    model.generation_config.repetition_penalty = 5.0
    assert torch.equal(plain, generate_text(model, num_sequences=4, num_tokens=10)["input_ids"])


def test_model_without_a_begin_token_needs_one():
    with pytest.raises(ValueError, match=r"Bigrams has neither a begin nor an end token.*begin_token="):
        generate_text(Bigrams())


@pytest.mark.parametrize("argument", ["num_sequences", "num_tokens", "batch_size"])
def test_number_that_is_none_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}=0 must be an int of at least 1"):
        generate_text(Bigrams(), begin_token=0, **{argument: 0})


def test_file_gives_back_the_text(tmp_path):
    text = generate_text(llama(), num_sequences=3, num_tokens=6)
    save_text(tmp_path / "text.safetensors", text)
    back = load_text(tmp_path / "text.safetensors")
    assert back.keys() == text.keys()
    assert all(torch.equal(back[name], text[name]) for name in text)


def test_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "text.safetensors"
    save_text(path, generate_text(llama(), num_sequences=3, num_tokens=6))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: the content of"):
        load_text(path)
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match="truncated"):
        load_text(path)
    with pytest.raises(FileNotFoundError):
        load_text(tmp_path / "none")


def test_batches_hold_every_sequence_once():
    text = generate_text(llama(), num_sequences=7, num_tokens=4)
    parts = list(split(text, 3))
    assert [len(part["input_ids"]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), text["input_ids"])


def test_text_begins_with_random_tokens_that_stand_for_text():
    model = llama()
    config = model.config
    text = generate_text(model, num_sequences=400, num_tokens=3, batch_size=100, begin_token="random")["input_ids"]
    special = {config.bos_token_id, config.eos_token_id}
    assert set(text[:, 0].tolist()) == set(range(config.vocab_size)) - special
    again = generate_text(model, num_sequences=400, num_tokens=3, batch_size=100, begin_token="random")["input_ids"]
    assert torch.equal(text, again)


def test_a_random_begin_needs_a_vocabulary():
    with pytest.raises(ValueError, match="Bigrams has no vocab_size in its configuration"):
        generate_text(Bigrams(), begin_token="random")
    with pytest.raises(ValueError, match="begin_token='any' is unknown"):
        generate_text(llama(), begin_token="any")
