"""A Llama of a million parameters that knows the text world, and a mixture of experts of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

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


def moe_config(tokenizer: PreTrainedTokenizerBase) -> MixtralConfig:
    """Three layers of eight experts, two of which answer each word."""
    return MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.06,
        tie_word_embeddings=True,
        # So that all experts learn something.
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )


def small_llama(cache: Path, further_words: Sequence[str], schooling: Schooling) -> Path:
    """The folder of the pretrained Llama and its tokenizer; it is trained the first time.

    Args:
        cache: where it is kept.
        further_words: texts with words that the tokenizer must know beside those of the world.
        schooling: how long and how fast it learns the facts.
    """
    return _pretrained(
        "small-llama", lambda words: LlamaForCausalLM(language_config(words)), cache, further_words, schooling
    )


def small_moe(cache: Path, further_words: Sequence[str], schooling: Schooling) -> Path:
    """The folder of the pretrained mixture of experts and its tokenizer; see :func:`small_llama`."""
    return _pretrained(
        "small-moe", lambda words: MixtralForCausalLM(moe_config(words)), cache, further_words, schooling
    )


def _pretrained(
    name: str,
    make: Callable[[PreTrainedTokenizerBase], PreTrainedModel],
    cache: Path,
    further_words: Sequence[str],
    schooling: Schooling,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schooling.seed)
        tokenizer = word_tokenizer([*(f"{fact.prompt} {fact.answer}" for fact in facts()), *further_words])
        model = make(tokenizer)

        def build() -> tuple[nn.Module, Any]:
            school(model, tokenizer, facts(), schooling)
            if getattr(model.config, "output_router_logits", False):
                # From now on a loss is nats a token, without the balance of the experts.
                model.config.output_router_logits = False
            return model, tokenizer

        config = {"config": model.config.to_diff_dict(), "words": list(further_words)}
        return cached(cache, name, settings_of([schooling], facts(), config), build)
