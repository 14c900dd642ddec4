import pytest

from kappa_lightning.weights.roles import depth_and_role

NAMES = {
    "bert": (
        "bert.encoder.layer.7.attention.self.query.weight",
        (7, "bert.encoder.layer.*.attention.self.query.weight"),
    ),
    "bert-embedding": (
        "bert.embeddings.word_embeddings.weight",
        (None, "bert.embeddings.word_embeddings.weight"),
    ),
    "llama": ("model.layers.31.mlp.gate_proj.weight", (31, "model.layers.*.mlp.gate_proj.weight")),
    "llama-head": ("lm_head.weight", (None, "lm_head.weight")),
    "gpt2": ("transformer.h.0.attn.c_attn.weight", (0, "transformer.h.*.attn.c_attn.weight")),
    "gpt2-without-head": ("h.11.mlp.c_fc.weight", (11, "h.*.mlp.c_fc.weight")),
    "t5": (
        "decoder.block.3.layer.1.EncDecAttention.q.weight",
        (3, "decoder.block.*.layer.*.EncDecAttention.q.weight"),
    ),
    "vit-timm": ("blocks.10.attn.qkv.weight", (10, "blocks.*.attn.qkv.weight")),
    "vit-transformers": (
        "vit.encoder.layer.2.intermediate.dense.weight",
        (2, "vit.encoder.layer.*.intermediate.dense.weight"),
    ),
    "clip": (
        "vision_model.encoder.layers.4.self_attn.k_proj.weight",
        (4, "vision_model.encoder.layers.*.self_attn.k_proj.weight"),
    ),
    "mixtral-separate": (
        "model.layers.5.block_sparse_moe.experts.6.w2.weight",
        (5, "model.layers.*.block_sparse_moe.experts.*.w2.weight"),
    ),
    "mixtral-fused": ("model.layers.5.mlp.experts.gate_up_proj", (5, "model.layers.*.mlp.experts.gate_up_proj")),
    "resnet": ("layer3.4.conv2.weight", (4, "layer3.*.conv2.weight")),
    "resnet-shortcut": ("layer2.0.downsample.0.weight", (0, "layer2.*.downsample.*.weight")),
    "resnet-stem": ("conv1.weight", (None, "conv1.weight")),
    "vgg": ("features.28.weight", (28, "features.*.weight")),
    "sequential": ("0.weight", (0, "*.weight")),
    "whisper": (
        "model.decoder.layers.3.encoder_attn.q_proj.weight",
        (3, "model.decoder.layers.*.encoder_attn.q_proj.weight"),
    ),
    "peft": (
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
        (1, "base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight"),
    ),
    "parametrized": (
        "blocks.2.fc.parametrizations.weight.original1",
        (2, "blocks.*.fc.parametrizations.weight.original1"),
    ),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.values(), ids=NAMES)
def test_name_tells_depth_and_role(name, expected):
    assert depth_and_role(name) == expected


@pytest.mark.parametrize("name", ["conv1d.weight", "fc2.weight", "w1", "layer_norm2d.weight", "p4.x5.y", "3d.weight"])
def test_digits_that_are_part_of_a_word_are_no_depth(name):
    assert depth_and_role(name) == (None, name)


def test_number_at_the_end_of_a_name_is_no_depth_unless_a_part_follows():
    assert depth_and_role("scales.3") == (None, "scales.3")
    assert depth_and_role("scales.3.weight") == (3, "scales.*.weight")


def test_neighboring_numbers_are_both_left_out():
    assert depth_and_role("net.3.12.0.weight") == (3, "net.*.*.*.weight")


def test_one_role_for_all_layers_and_experts_of_a_model():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1.weight" for layer in range(12) for expert in range(8)]
    found = {depth_and_role(name) for name in names}
    assert {role for _, role in found} == {"model.layers.*.mlp.experts.*.w1.weight"}
    assert {depth for depth, _ in found} == set(range(12))


def test_index_of_a_wrapper_is_not_taken_for_the_depth():
    # A SentenceTransformer, and any nn.Sequential around an encoder: the first number is the encoder's place in it.
    depths = [depth_and_role(f"0.auto_model.encoder.layer.{layer}.output.dense.weight")[0] for layer in range(6)]
    assert depths == list(range(6))


def test_depth_in_the_name_of_a_layer_of_torchvisions_vit_is_seen():
    depths = [depth_and_role(f"encoder.layers.encoder_layer_{layer}.mlp.0.weight")[0] for layer in range(12)]
    assert depths == list(range(12))
