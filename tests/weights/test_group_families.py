"""The groups of one tiny model of each large family, and of the names in its files."""

import lightning.pytorch as pl
import pytest
import transformers

from kappa_lightning.weights import plain_parameters
from kappa_lightning.weights.groups import GROUPS, group_members
from kappa_lightning.weights.roles import depth_and_role

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
Q_K_V_O = ("q_proj", "k_proj", "v_proj", "o_proj")


def make(architecture, **sizes):
    model = getattr(transformers, architecture)
    return model(model.config_class(**sizes))


def llama(prefix="model.layers.*."):
    """The groups that Llama, Qwen, Gemma and Mistral have alike."""
    return {
        "@embeddings": {"model.embed_tokens"},
        "@attention": {f"{prefix}self_attn.{name}" for name in Q_K_V_O},
        "@mlp": {f"{prefix}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
        "@gate_up": {f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"},
        "@down": {f"{prefix}mlp.down_proj"},
    }


def experts(moe, *routers, shared=None):
    """The groups of fused experts beside ``llama``'s embeddings and attention."""
    fused = {f"model.layers.*.{moe}.experts.gate_up_proj", f"model.layers.*.{moe}.experts.down_proj"}
    shares = {f"model.layers.*.{moe}.{shared}.{name}_proj" for name in ("gate", "up", "down") if shared}
    every = fused | shares
    down = {name for name in every if name.endswith("down_proj")}
    return {
        "@embeddings": {"model.embed_tokens"},
        "@attention": llama()["@attention"],
        "@mlp": every,
        "@experts": every,
        "@gate_up": every - down,
        "@down": down,
        "@router": {f"model.layers.*.{moe}.{router}" for router in routers},
        "@head": {"lm_head"},
    }


def text_and_vision(text, vision):
    """The groups of SmolVLM: Llama behind SigLIP's tower, and none for the connector between them."""
    tower = f"{vision}encoder.layers.*."
    groups = {group: {role.replace("model.", text) for role in roles} for group, roles in llama().items()}
    groups["@embeddings"] |= {f"{vision}embeddings.{kind}_embedding" for kind in ("patch", "position")}
    groups["@attention"] |= {f"{tower}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    groups["@mlp"] |= {f"{tower}mlp.fc1", f"{tower}mlp.fc2"}
    groups["@gate_up"].add(f"{tower}mlp.fc1")
    groups["@down"].add(f"{tower}mlp.fc2")
    return groups | HEAD


HEAD = {"@head": {"lm_head"}}
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": (lambda: make("LlamaForCausalLM", **DECODER), llama() | HEAD),
    "qwen3-tied": (lambda: make("Qwen3ForCausalLM", **DECODER, **TIED), llama()),
    "gemma2-tied": (lambda: make("Gemma2ForCausalLM", **DECODER, head_dim=8, **TIED), llama()),
    "mistral": (lambda: make("MistralForCausalLM", **DECODER), llama() | HEAD),
    "gpt2": (
        lambda: make("GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8),
        {
            "@embeddings": {"transformer.wte", "transformer.wpe"},
            "@attention": {"transformer.h.*.attn.c_attn", "transformer.h.*.attn.c_proj"},
            "@mlp": {"transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"},
            "@gate_up": {"transformer.h.*.mlp.c_fc"},
            "@down": {"transformer.h.*.mlp.c_proj"},
        },
    ),
    "gpt-neox": (
        lambda: make("GPTNeoXForCausalLM", **SIZES, intermediate_size=24),
        {
            "@embeddings": {"gpt_neox.embed_in"},
            "@attention": {f"gpt_neox.layers.*.attention.{name}" for name in ("query_key_value", "dense")},
            "@mlp": {f"gpt_neox.layers.*.mlp.dense_{name}" for name in ("h_to_4h", "4h_to_h")},
            "@gate_up": {"gpt_neox.layers.*.mlp.dense_h_to_4h"},
            "@down": {"gpt_neox.layers.*.mlp.dense_4h_to_h"},
            "@head": {"lm_head"},
        },
    ),
    "bert": (
        lambda: make("BertForSequenceClassification", **SIZES, intermediate_size=24),
        {
            "@embeddings": {f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")},
            "@attention": {
                f"bert.encoder.layer.*.attention.{name}"
                for name in ("self.query", "self.key", "self.value", "output.dense")
            },
            "@mlp": {"bert.encoder.layer.*.intermediate.dense", "bert.encoder.layer.*.output.dense"},
            "@gate_up": {"bert.encoder.layer.*.intermediate.dense"},
            "@down": {"bert.encoder.layer.*.output.dense"},
            "@head": {"classifier"},
        },
    ),
    "vit": (
        lambda: make("ViTForImageClassification", **VISION),
        {
            "@embeddings": {
                f"vit.embeddings.{name}" for name in ("cls_token", "position_embeddings", "patch_embeddings.projection")
            },
            "@attention": {f"vit.layers.*.attention.{name}" for name in Q_K_V_O},
            "@mlp": {"vit.layers.*.mlp.fc1", "vit.layers.*.mlp.fc2"},
            "@gate_up": {"vit.layers.*.mlp.fc1"},
            "@down": {"vit.layers.*.mlp.fc2"},
            "@head": {"classifier"},
        },
    ),
    "swin": (
        lambda: make(
            "SwinForImageClassification", image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
            window_size=2,
        ),
        {
            "@embeddings": {
                "swin.embeddings.patch_embeddings.projection",
                "swin.encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table",
            },
            "@attention": {f"swin.encoder.layers.*.blocks.*.attention.{name}" for name in Q_K_V_O},
            "@mlp": {"swin.encoder.layers.*.blocks.*.mlp.fc1", "swin.encoder.layers.*.blocks.*.mlp.fc2"},
            "@gate_up": {"swin.encoder.layers.*.blocks.*.mlp.fc1"},
            "@down": {"swin.encoder.layers.*.blocks.*.mlp.fc2"},
            "@head": {"classifier"},
        },
    ),
    "clip": (
        lambda: make(
            "CLIPModel", text_config={**SIZES, "intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1},
            vision_config=VISION,
        ),
        {
            "@embeddings": {
                *(f"text_model.embeddings.{name}_embedding" for name in ("token", "position")),
                *(f"vision_model.embeddings.{name}_embedding" for name in ("class", "patch", "position")),
            },
            "@attention": {
                f"{tower}_model.encoder.layers.*.self_attn.{name}"
                for tower in ("text", "vision")
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            },
            "@mlp": {f"{t}_model.encoder.layers.*.mlp.{name}" for t in ("text", "vision") for name in ("fc1", "fc2")},
            "@gate_up": {f"{tower}_model.encoder.layers.*.mlp.fc1" for tower in ("text", "vision")},
            "@down": {f"{tower}_model.encoder.layers.*.mlp.fc2" for tower in ("text", "vision")},
        },
    ),
    "t5": (
        lambda: make(
            "T5ForConditionalGeneration", vocab_size=31, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
        {
            "@embeddings": {
                "shared",
                *(f"{half}.block.*.layer.*.SelfAttention.relative_attention_bias" for half in ("encoder", "decoder")),
            },
            "@attention": {
                f"{place}.{name}"
                for place in ("encoder.block.*.layer.*.SelfAttention", "decoder.block.*.layer.*.SelfAttention",
                              "decoder.block.*.layer.*.EncDecAttention")
                for name in "qkvo"
            },
            "@mlp": {
                f"{half}.block.*.layer.*.DenseReluDense.{name}"
                for half in ("encoder", "decoder") for name in ("wi_0", "wi_1", "wo")
            },
            "@gate_up": {
                f"{half}.block.*.layer.*.DenseReluDense.{name}"
                for half in ("encoder", "decoder") for name in ("wi_0", "wi_1")
            },
            "@down": {f"{half}.block.*.layer.*.DenseReluDense.wo" for half in ("encoder", "decoder")},
        },
    ),
    "phi": (
        lambda: make("PhiForCausalLM", **DECODER),
        {
            "@embeddings": {"model.embed_tokens"},
            "@attention": {f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")},
            "@mlp": {"model.layers.*.mlp.fc1", "model.layers.*.mlp.fc2"},
            "@gate_up": {"model.layers.*.mlp.fc1"},
            "@down": {"model.layers.*.mlp.fc2"},
            "@head": {"lm_head"},
        },
    ),
    "phi3": (
        lambda: make("Phi3ForCausalLM", **DECODER | {"bos_token_id": 1, "eos_token_id": 2}),
        {
            "@embeddings": {"model.embed_tokens"},
            "@attention": {"model.layers.*.self_attn.qkv_proj", "model.layers.*.self_attn.o_proj"},
            "@mlp": {"model.layers.*.mlp.gate_up_proj", "model.layers.*.mlp.down_proj"},
            "@gate_up": {"model.layers.*.mlp.gate_up_proj"},
            "@down": {"model.layers.*.mlp.down_proj"},
            "@head": {"lm_head"},
        },
    ),
    "falcon": (
        lambda: make("FalconForCausalLM", **SIZES),
        {
            "@embeddings": {"transformer.word_embeddings"},
            "@attention": {f"transformer.h.*.self_attention.{name}" for name in ("query_key_value", "dense")},
            "@mlp": {"transformer.h.*.mlp.dense_h_to_4h", "transformer.h.*.mlp.dense_4h_to_h"},
            "@gate_up": {"transformer.h.*.mlp.dense_h_to_4h"},
            "@down": {"transformer.h.*.mlp.dense_4h_to_h"},
        },
    ),
    "opt": (
        lambda: make(
            "OPTForCausalLM", vocab_size=31, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=8, max_position_embeddings=9,
        ),
        {
            "@embeddings": {"model.decoder.embed_tokens", "model.decoder.embed_positions"},
            "@attention": {
                f"model.decoder.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            },
            "@mlp": {"model.decoder.layers.*.fc1", "model.decoder.layers.*.fc2"},
            "@gate_up": {"model.decoder.layers.*.fc1"},
            "@down": {"model.decoder.layers.*.fc2"},
        },
    ),
    "bloom": (
        lambda: make("BloomForCausalLM", vocab_size=31, hidden_size=16, n_layer=1, n_head=2),
        {
            "@embeddings": {"transformer.word_embeddings"},
            "@attention": {f"transformer.h.*.self_attention.{name}" for name in ("query_key_value", "dense")},
            "@mlp": {"transformer.h.*.mlp.dense_h_to_4h", "transformer.h.*.mlp.dense_4h_to_h"},
            "@gate_up": {"transformer.h.*.mlp.dense_h_to_4h"},
            "@down": {"transformer.h.*.mlp.dense_4h_to_h"},
        },
    ),
    "mixtral": (
        lambda: make("MixtralForCausalLM", **DECODER, num_local_experts=3),
        experts("mlp", "gate"),
    ),
    "qwen3-moe": (
        lambda: make("Qwen3MoeForCausalLM", **DECODER, num_experts=3, moe_intermediate_size=8),
        experts("mlp", "gate"),
    ),
    "qwen2-moe": (
        lambda: make(
            "Qwen2MoeForCausalLM", **DECODER, num_experts=3, moe_intermediate_size=8, shared_expert_intermediate_size=8
        ),
        experts("mlp", "gate", "shared_expert_gate", shared="shared_expert"),
    ),
    "deepseek-v3": (
        lambda: make(
            "DeepseekV3ForCausalLM", **DECODER, moe_intermediate_size=8, n_routed_experts=4, n_group=2, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=0, kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=4,
        ),
        experts("mlp", "gate", shared="shared_experts")
        | {
            "@attention": {
                f"model.layers.*.self_attn.{name}"
                for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
            }
        },
    ),
    "olmoe": (lambda: make("OlmoeForCausalLM", **DECODER | {"pad_token_id": 1}, num_experts=3), experts("mlp", "gate")),
    "gpt-oss": (
        lambda: make("GptOssForCausalLM", **DECODER, num_local_experts=3, head_dim=8),
        experts("mlp", "router") | {"@attention": llama()["@attention"] | {"model.layers.*.self_attn.sinks"}},
    ),
    "llama4": (
        lambda: make("Llama4ForCausalLM", **DECODER, num_local_experts=3, head_dim=8, intermediate_size_mlp=24),
        experts("feed_forward", "router", shared="shared_expert"),
    ),
    "granite-moe": (
        lambda: make("GraniteMoeForCausalLM", **DECODER, num_local_experts=3, tie_word_embeddings=False),
        experts("block_sparse_moe", "router"),
    ),
    "smolvlm": (
        lambda: make(
            "SmolVLMForConditionalGeneration", vision_config=VISION, image_token_id=30, scale_factor=1,
            text_config={**DECODER, "model_type": "llama"},
        ),
        text_and_vision("model.text_model.", "model.vision_model."),
    ),
    "mamba": (
        lambda: make("MambaForCausalLM", vocab_size=31, hidden_size=8, num_hidden_layers=1, state_size=4),
        {"@embeddings": {"backbone.embeddings"}},
    ),
}  # fmt: skip


def role_of(name):
    """The layer, by its role: a bias goes with its weight."""
    for end in (".weight", ".bias", "_bias"):
        if not name.endswith("attention_bias.weight" if end == ".bias" else "attention_bias"):
            name = name.removesuffix(end)
    return depth_and_role(name)[1]


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    build, expected = FAMILIES[request.param]
    return build(), expected


@pytest.mark.parametrize("by_name", [False, True])
def test_groups_of_a_family_hold_exactly_these_layers(family, by_name):
    model, expected = family
    names = list(plain_parameters(model))
    module = None if by_name else model
    found = {group: {role_of(name) for name in group_members(group, names, module)} for group in GROUPS}
    assert {group: roles for group, roles in found.items() if roles} == expected


def test_a_bias_is_in_the_groups_of_its_weight(family):
    model, _ = family
    names = set(plain_parameters(model))
    for group in GROUPS:
        members = group_members(group, names, model)
        assert {n for n in members if n.endswith(".bias")} == {
            f"{n.removesuffix('.weight')}.bias" for n in members if n.endswith(".weight")
        } & names


def test_groups_are_the_same_inside_a_lightning_module(family):
    model, _ = family
    names = list(plain_parameters(model))
    wrapped = pl.LightningModule()
    wrapped.net = model
    for group in GROUPS:
        expected = {f"net.{name}" for name in group_members(group, names, model)}
        assert group_members(group, [f"net.{name}" for name in names], wrapped) == expected


ON_DISK = {
    "mixtral": (
        {"model.layers.0.block_sparse_moe.experts.1.w1.weight": "@experts @gate_up @mlp",
         "model.layers.0.block_sparse_moe.experts.1.w3.weight": "@experts @gate_up @mlp",
         "model.layers.0.block_sparse_moe.experts.1.w2.weight": "@down @experts @mlp",
         "model.layers.0.block_sparse_moe.gate.weight": "@router"}
    ),
    "qwen-moe": (
        {"model.layers.0.mlp.experts.7.gate_proj.weight": "@experts @gate_up @mlp",
         "model.layers.0.mlp.experts.7.down_proj.weight": "@down @experts @mlp",
         "model.layers.0.mlp.gate.weight": "@router",
         "model.layers.0.mlp.shared_expert.up_proj.weight": "@experts @gate_up @mlp",
         "model.layers.0.mlp.shared_expert_gate.weight": "@router"}
    ),
    "deepseek": (
        {"model.layers.3.mlp.gate.e_score_correction_bias": "@router",
         "model.layers.3.mlp.experts.200.up_proj.weight": "@experts @gate_up @mlp",
         "model.layers.0.mlp.gate_proj.weight": "@gate_up @mlp"}
    ),
    "granite-moe": (
        {"model.layers.0.block_sparse_moe.input_linear.weight": "@experts @gate_up @mlp",
         "model.layers.0.block_sparse_moe.output_linear.weight": "@down @experts @mlp",
         "model.layers.0.block_sparse_moe.router.layer.weight": "@router",
         "model.layers.0.shared_mlp.input_linear.weight": "@experts @gate_up @mlp"}
    ),
    "granite-dense-hybrid": (
        {"model.layers.0.shared_mlp.input_linear.weight": "@gate_up @mlp",
         "model.layers.0.shared_mlp.output_linear.weight": "@down @mlp"}
    ),
    "jetmoe": (
        {"model.layers.0.mlp.input_linear.weight": "@experts @gate_up @mlp",
         "model.layers.0.mlp.output_linear.weight": "@down @experts @mlp",
         "model.layers.0.mlp.bias": "@mlp",
         "model.layers.0.mlp.router.layer.weight": "@router",
         "model.layers.0.self_attention.experts.input_linear.weight": "@attention @experts",
         "model.layers.0.self_attention.experts.router.layer.weight": "@router",
         "model.layers.0.self_attention.kv_proj.weight": "@attention"}
    ),
    "albert": (
        {f"albert.encoder.albert_layer_groups.{group}.albert_layers.0.{layer}.weight": f"{side} @mlp"
         for group in (0, 2) for layer, side in (("ffn", "@gate_up"), ("ffn_output", "@down"))}
    ),
    "xlnet": (
        {"transformer.mask_emb": "@embeddings", "transformer.layer.2.rel_attn.seg_embed": "@embeddings",
         "transformer.layer.2.rel_attn.q": "@attention", "transformer.layer.2.rel_attn.r_w_bias": "@attention",
         "transformer.layer.2.ff.layer_1.weight": "@gate_up @mlp",
         "transformer.layer.2.ff.layer_2.weight": "@down @mlp", "logits_proj.weight": "@head"}
    ),
    "gemma3n": (
        {"model.language_model.layers.0.altup.modality_router.weight": "",
         "model.language_model.layers.0.mlp.gate_proj.weight": "@gate_up @mlp"}
    ),
    "connectors": (
        {"model.connector.modality_projection.proj.weight": "",
         "model.multi_modal_projector.linear_1.weight": "",
         "model.connector.perceiver_resampler.layers.0.mlp.down_proj.weight": ""}
    ),
    "numbered-layers": (
        {"blocks.0.mlp.weight": "@mlp", "blocks.2.mlp.weight": "@mlp", "blocks.2.mlp.0.weight": "@gate_up @mlp",
         "blocks.0.mlp.2.weight": "@down @mlp"}
    ),
    "switch": (
        {"encoder.block.1.layer.1.mlp.router.classifier.weight": "@router",
         "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight": "@experts @gate_up @mlp",
         "encoder.block.1.layer.1.mlp.experts.expert_0.wo.weight": "@down @experts @mlp"}
    ),
    "dbrx": (
        {"transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight": "@attention",
         "transformer.blocks.0.norm_attn_norm.norm_1.weight": "",
         "transformer.blocks.0.ffn.router.layer.weight": "@router",
         "transformer.blocks.0.ffn.experts.mlp.v1": "@experts @gate_up @mlp",
         "transformer.blocks.0.ffn.experts.mlp.w2": "@down @experts @mlp"}
    ),
    "llama-original": (
        {"tok_embeddings.weight": "@embeddings", "output.weight": "@head", "norm.weight": "",
         "layers.0.attention.wo.weight": "@attention", "layers.0.feed_forward.w1.weight": "@gate_up @mlp",
         "layers.0.feed_forward.w2.weight": "@down @mlp", "layers.0.attention_norm.weight": ""}
    ),
    "vit-older": (
        {"vit.encoder.layer.0.attention.attention.query.weight": "@attention",
         "vit.encoder.layer.0.attention.output.dense.weight": "@attention",
         "vit.encoder.layer.0.intermediate.dense.weight": "@gate_up @mlp",
         "vit.encoder.layer.0.output.dense.weight": "@down @mlp"}
    ),
    "timm-vit": (
        {"pos_embed": "@embeddings", "cls_token": "@embeddings", "patch_embed.proj.weight": "@embeddings",
         "blocks.0.attn.qkv.weight": "@attention", "blocks.0.attn.proj.weight": "@attention",
         "blocks.0.mlp.fc2.weight": "@down @mlp", "blocks.0.norm1.weight": "", "blocks.0.ls1.gamma": "",
         "head.weight": "@head"}
    ),
    "torchvision-vit": (
        {"class_token": "@embeddings", "conv_proj.weight": "@embeddings", "encoder.pos_embedding": "@embeddings",
         "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": "@attention",
         "encoder.layers.encoder_layer_0.mlp.0.weight": "@gate_up @mlp",
         "encoder.layers.encoder_layer_0.mlp.3.weight": "@down @mlp",
         "encoder.layers.encoder_layer_0.ln_1.weight": "", "heads.head.weight": "@head"}
    ),
    "resnet": (
        {"conv1.weight": "", "layer1.0.conv2.weight": "", "layer1.0.bn1.weight": "", "layer1.0.se.fc1.weight": "",
         "fc.weight": "@head"}
    ),
    "diffusers": (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": "@attention",
         "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": "@gate_up @mlp",
         "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight": "@down @mlp",
         "down_blocks.0.resnets.0.conv1.weight": ""}
    ),
    "heads": (
        {"lm_head.dense.weight": "@head", "lm_head.layer_norm.weight": "@head", "score.weight": "@head",
         "qa_outputs.bias": "@head", "model.layers.0.self_attn.head.weight": "@attention",
         "transformer.layers.3.head.weight": ""}
    ),
    "adapters": (
        {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": "@attention",
         "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight": "@down @mlp",
         "base_model.model.model.embed_tokens.lora_embedding_A.default": "@embeddings",
         "base_model.model.score.modules_to_save.default.weight": "@head",
         "h.0.mlp.c_fc.parametrizations.weight.original1": "@gate_up @mlp", "layers.0.ff.w2.weight_v": "@down @mlp"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ON_DISK)
def test_names_in_files_tell_their_groups(family):
    expected = {name: set(groups.split()) for name, groups in ON_DISK[family].items()}
    members = {group: group_members(group, expected) for group in GROUPS}
    assert {name: {group for group in GROUPS if name in members[group]} for name in expected} == expected
