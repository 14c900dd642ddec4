"""A Llama of a million parameters that knows the text world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from recipes.shared.pretraining import Schooling, cached, school, settings_of
from recipes.shared.world import facts, word_tokenizer


def language_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Four layers for the words of a tokenizer."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # The usual 0.02 is for widths of thousands: at this one attention would take several times as long to form.
        initializer_range=0.06,
        tie_word_embeddings=True,
    )


def small_llama(cache: Path, further_words: Sequence[str], schooling: Schooling) -> Path:
    """The folder of the pretrained model and its tokenizer; it is trained the first time.

    Args:
        cache: where it is kept.
        further_words: texts with words that the tokenizer must know beside those of the world.
        schooling: how long and how fast it learns the facts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schooling.seed)
        tokenizer = word_tokenizer([*(f"{fact.prompt} {fact.answer}" for fact in facts()), *further_words])
        model = LlamaForCausalLM(language_config(tokenizer))

        def build() -> tuple[nn.Module, Any]:
            school(model, tokenizer, facts(), schooling)
            return model, tokenizer

        config = {"config": model.config.to_diff_dict(), "words": list(further_words)}
        return cached(cache, "small-llama", settings_of([schooling], facts(), config), build)
