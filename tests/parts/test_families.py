"""Experts and heads of the families that transformers knows, on tiny models made from their own configurations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from mixtures import FAMILIES, TRANSPOSED, build
from torch import nn

from kappa_lightning import spectrum
from kappa_lightning.parts import split_into_parts, train_parts
from kappa_lightning.weights import find_weights


def fused(model: nn.Module, attribute: str) -> tuple[str, nn.Parameter]:
    return next((n, p) for n, p in model.named_parameters() if n.endswith(f"experts.{attribute}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_a_weight_whose_kappa_is_that_of_its_matrix(family):
    model = build(family)
    weights = {weight.name: weight for weight in split_into_parts(find_weights(model), model)}
    name, parameter = fused(model, "down_proj")
    assert name not in weights
    for expert in range(4):
        weight = weights[f"{name}[{expert}]"]
        assert weight.shape == tuple(parameter.shape[1:])
        values = np.linalg.svd(parameter[expert].detach().double().numpy(), compute_uv=False)
        kappa = spectrum(weight.matrices()).kappa
        assert kappa.shape == (1,)
        assert float(kappa) == pytest.approx(values[0] / values[-1], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_up_apart_are_what_the_layer_multiplies_with(family):
    model = build(family)
    name, parameter = fused(model, "gate_up_proj")
    weights = {w.name: w for w in split_into_parts(find_weights(model), model, gate_up="apart")}
    gate, up = weights[f"{name}[2:gate]"].matrices()[0], weights[f"{name}[2:up]"].matrices()[0]
    if family == "GptOss":
        expected = parameter[2][:, ::2], parameter[2][:, 1::2]
    elif family in TRANSPOSED:
        expected = parameter[2].chunk(2, dim=1)
    else:
        expected = parameter[2].chunk(2, dim=0)
    assert torch.equal(gate, expected[0])
    assert torch.equal(up, expected[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_trains_and_the_model_computes_what_it_did(family):
    model = build(family)
    tokens = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = build(family)
    whole(tokens).logits.square().sum().backward()
    down, gradient = fused(whole, "down_proj")[0], fused(whole, "down_proj")[1].grad
    assert gradient is not None
    hit = next(expert for expert in range(4) if gradient[expert].any())
    parts = [w.part for w in split_into_parts(find_weights(model), model) if w.name == f"{down}[{hit}]"]
    model.requires_grad_(False)
    training = train_parts(model, [part for part in parts if part is not None])
    logits = model(tokens).logits
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    (part,) = training.parameters.values()
    torch.testing.assert_close(part.grad, gradient[hit], rtol=1e-4, atol=1e-6)
    torch.optim.AdamW([part], lr=0.01, weight_decay=0.1).step()
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [down]
    others = [expert for expert in range(4) if expert != hit]
    assert torch.equal(after[down][others], before[down][others])


def test_checkpoint_of_a_model_whose_experts_train_loads_without_this_package(tmp_path):
    model = build("Mixtral")
    name, _ = fused(model, "down_proj")
    parts = [w.part for w in split_into_parts(find_weights(model), model) if w.name == f"{name}[1]"]
    training = train_parts(model, [part for part in parts if part is not None])
    with torch.no_grad():
        training.parameters[f"{name}[1]"].add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        ("Mixtral", {"q_proj": (4, 8), "k_proj": (2, 8), "v_proj": (2, 8), "o_proj": (4, 8)}),
        ("DeepseekV2", {"q_proj": (4, 12), "kv_b_proj": (4, 14), "o_proj": (4, 6)}),
        ("DeepseekV3", {"q_b_proj": (4, 12), "kv_b_proj": (4, 14), "o_proj": (4, 6)}),
        ("GptOss", {"q_proj": (4, 8), "k_proj": (2, 8), "v_proj": (2, 8), "o_proj": (4, 8)}),
    ],
)
def test_heads_are_as_many_and_as_wide_as_the_configuration_says(family, widths):
    model = build(family)
    weights = split_into_parts(find_weights(model), model, experts=False, heads=True)
    for projection, (count, width) in widths.items():
        found = [weight for weight in weights if f"{projection}.weight[" in weight.name]
        assert len(found) == count
        dim = 1 if projection == "o_proj" else 0
        assert {weight.shape[dim] for weight in found} == {width}
    others = [weight for weight in weights if "[" in weight.name and "attn" not in weight.name]
    assert not others


def test_heads_of_gpt2_bert_and_torch_attention():
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    names = {weight.name: weight.shape for weight in split_into_parts(find_weights(gpt2), gpt2, heads=True)}
    assert names["h.0.attn.c_attn.weight[k head 1]"] == (8, 4)
    assert names["h.0.attn.c_proj.weight[head 1]"] == (4, 8)
    key = {w.name: w for w in split_into_parts(find_weights(gpt2), gpt2, heads=True)}
    expected = gpt2.h[0].attn.c_attn.weight[:, 12:16]
    assert torch.equal(key["h.0.attn.c_attn.weight[k head 1]"].matrices()[0], expected)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    names = {weight.name: weight.shape for weight in split_into_parts(find_weights(bert), bert, heads=True)}
    assert names["encoder.layer.0.attention.self.query.weight[head 1]"] == (4, 8)
    assert names["encoder.layer.0.attention.output.dense.weight[head 0]"] == (8, 4)
    assert names["encoder.layer.0.output.dense.weight"] == (8, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    names = {weight.name: weight.shape for weight in split_into_parts(find_weights(layer), layer, heads=True)}
    assert names["self_attn.in_proj_weight[q head 1]"] == (4, 8)
    assert names["self_attn.out_proj.weight[head 0]"] == (8, 4)
    assert names["linear1.weight"] == (16, 8)


def test_gate_up_without_its_down_projection_says_so():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 5))

    module = Odd()
    with pytest.raises(ValueError, match="where gate ends"):
        split_into_parts(find_weights(module), module, gate_up="apart")
