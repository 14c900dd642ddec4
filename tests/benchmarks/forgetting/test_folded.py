"""Folding a norm's gain into the matrices behind it changes κ, and not the function."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.forgetting.controls import folded_gains
from benchmarks.forgetting.folded import compare


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            nn.init.uniform_(parameter, 0.2, 3.0)
    return model


def test_the_function_is_the_same_and_the_weights_are_put_back(model):
    tokens = torch.arange(6)[None]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = model(tokens).logits
    with folded_gains(model):
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
        assert torch.equal(
            model.model.layers[0].self_attn.o_proj.weight, before["model.layers.0.self_attn.o_proj.weight"]
        )
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                nn.init.ones_(norm.weight)
        torch.testing.assert_close(model(tokens).logits, expected)
    for name, parameter in model.named_parameters():
        assert "layernorm" in name or torch.equal(parameter, before[name])


def test_what_is_chosen_with_and_without(model):
    lines = compare(model, 0.5)
    assert lines[0].startswith("15 matrices, 50% of")  # the head is none of the embeddings
    assert "in both" in lines[3]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="no gain to fold"), folded_gains(nn.Linear(2, 2)):
        pass
