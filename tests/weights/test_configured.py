"""A checkpoint with its config beside it is read as the model that transformers makes of it."""

import json
import sys

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file, save_file
from torch import nn

from kappa_lightning import KappaFreezeCallback, KappaProfile
from kappa_lightning.weights import checkpoint_weights

DECODER = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
MODELS = {
    "ViTForImageClassification": VISION,
    "Dinov2Model": {k: v for k, v in VISION.items() if k != "intermediate_size"},
    "SwinForImageClassification": {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
                                   "num_heads": [1, 2], "window_size": 2},
    "SegformerForSemanticSegmentation": {"depths": [1] * 4, "hidden_sizes": [4] * 4, "num_attention_heads": [1] * 4,
                                         "decoder_hidden_size": 8},
    "MixtralForCausalLM": {**DECODER, "num_local_experts": 3},
    "Qwen3MoeForCausalLM": {**DECODER, "num_experts": 3, "moe_intermediate_size": 8},
    "OlmoeForCausalLM": {**DECODER, "pad_token_id": 1, "num_experts": 3},
    "GptOssForCausalLM": {**DECODER, "num_local_experts": 3, "head_dim": 8},
    "GraniteMoeForCausalLM": {**DECODER, "num_local_experts": 3},
    "Phi3ForCausalLM": {**DECODER, "bos_token_id": 1, "eos_token_id": 2},
    "LlamaForCausalLM": {**DECODER, "tie_word_embeddings": True},
    "T5ForConditionalGeneration": {"vocab_size": 31, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1,
                                   "num_heads": 2},
    "SpeechT5HifiGan": {"model_in_dim": 6, "upsample_initial_channel": 8, "upsample_rates": [2, 2],
                        "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3],
                        "resblock_dilation_sizes": [[1, 3]]},
    "EncodecModel": {"num_filters": 2, "hidden_size": 8, "codebook_size": 4, "codebook_dim": 8, "num_lstm_layers": 1,
                     "upsampling_ratios": [2, 2]},
    "Wav2Vec2Model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "conv_dim": [4, 4], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 4,
                      "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2},
}  # fmt: skip


def make(architecture):
    torch.manual_seed(1)
    kind = getattr(transformers, architecture)
    return kind(kind.config_class(**MODELS[architecture]))


def rows_of(profile):
    return {row.name: row for row in profile}


def scan(path, **options):
    return KappaProfile.from_checkpoint(path, progress=False, **options)


@pytest.fixture(params=MODELS, scope="module")
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(folder)
    return folder, getattr(transformers, request.param).from_pretrained(folder)


@pytest.mark.filterwarnings("error::UserWarning")
def test_scan_has_the_rows_of_the_loaded_model(saved):
    folder, model = saved
    profile = scan(folder)
    assert rows_of(profile) == rows_of(KappaProfile.from_model(model, progress=False))
    profile.check(model)


def test_scan_of_a_file_takes_the_config_beside_it(saved):
    folder, model = saved
    scan(folder / "model.safetensors").check(model)


def test_names_that_older_files_have_are_those_of_the_model(tmp_path):
    # A file of transformers 4, of which version 5 renames and fuses what it loads.
    model = make("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not set(state) & {"vit.layers.0.attention.q_proj.weight"}
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert "vit.layers.0.attention.q_proj.weight" in scan(tmp_path)
    scan(tmp_path).check(loaded)


def test_transposed_convolution_of_a_vocoder_has_the_kappa_of_the_model(tmp_path):
    model = make("SpeechT5HifiGan")
    model.save_pretrained(tmp_path)
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.ConvTranspose1d))
    layer = model.get_submodule(name)
    sigma = torch.linalg.svdvals(layer.weight.detach().double().transpose(0, 1).flatten(1))
    row = next(row for row in scan(tmp_path) if row.name.startswith(f"{name}."))
    assert row.kappa == pytest.approx(float(sigma[0] / sigma[-1]), rel=2e-3)
    assert row.layout.startswith("transposed convolution")


def test_profile_without_the_config_is_refused_where_the_layer_reads_the_tensor_in_another_way(tmp_path):
    class Up(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.up = nn.ConvTranspose1d(6, outputs, 3)

    for outputs in (4, 6):  # of the latter, the matrix has the same shape in both ways
        net = Up(outputs)
        save_file(net.state_dict(), tmp_path / "w.safetensors")
        with pytest.warns(UserWarning, match=r"no config\.json.*1 as (convolutions|stacks).*up\.weight.*transposed"):
            profile = scan(tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"up\.weight as a \w+, and its layer uses it as a transposed convolution"):
            profile.check(net)


class Vocoder(BoringModel):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(32, 32, 1)

    def forward(self, x):
        return self.layer(self.up(x.unsqueeze(-1)).squeeze(-1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_callback_refuses_a_row_whose_layer_reads_the_tensor_in_another_way_before_anything_changes(tmp_path):
    module = Vocoder()
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    callback = KappaFreezeCallback(num_tensors=1, profile=scan(tmp_path / "w.safetensors"))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"up\.weight .*its layer uses it as a transposed convolution"):
        trainer.fit(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_profile_of_a_version_that_kept_no_layout_is_still_read(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3))
    profile = KappaProfile.from_model(net, progress=False)
    state = profile.to_dict()
    for row in state["rows"]:
        del row["layout"]
    KappaProfile.from_dict(state).check(net)


def test_buffers_of_a_configured_model_have_no_rows(tmp_path):
    model = make("SwinForImageClassification")
    model.save_pretrained(tmp_path)
    names = {name for name, _ in model.named_parameters()}
    assert set(rows_of(scan(tmp_path))) <= names


def test_building_the_model_leaves_the_random_numbers_and_the_default_precision_alone(tmp_path):
    make("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    weights = checkpoint_weights(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert {weight.read().dtype for weight in weights} == {torch.bfloat16}


def with_config(folder, **changes):
    torch.manual_seed(0)
    state = {"conv.weight": torch.randn(4, 3, 3), "proj.weight": torch.randn(5, 4)}
    save_file(state, folder / "model.safetensors")
    if changes:
        (folder / "config.json").write_text(json.dumps(changes))
    return folder


HIDDEN = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
NO_MODEL = {
    "none": ({}, "no config.json beside it"),
    "foreign": ({"some": "thing"}, "is neither of transformers nor of diffusers"),
    "unknown": ({"model_type": "no-such-model"}, "makes no model of the config.json"),
    "remote-code": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}},
        "makes no model of the config.json",
    ),
    "other-model": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **DECODER}, "is another model's"),
    "too-deep": (
        {"model_type": "llama", **DECODER, "num_hidden_layers": 10**9}, "more layers than the checkpoint has tensors",
    ),
    "no-model": ({"model_type": "llama", "architectures": ["Trainer"], **HIDDEN, "num_hidden_layers": 1}, "another"),
    "bad-sizes": ({"model_type": "llama", **DECODER, "hidden_size": "wide"}, "makes no model of the config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MODEL)
def test_without_a_model_to_take_the_layers_from_a_warning_says_why_and_what_was_assumed(kind, tmp_path):
    changes, reason = NO_MODEL[kind]
    folder = with_config(tmp_path, **changes)
    with pytest.warns(UserWarning, match=reason) as caught:
        profile = scan(folder)
    assert "1 as convolutions with their outputs first (conv.weight first)" in str(caught[-1].message)
    assert set(rows_of(profile)) == {"conv.weight", "proj.weight"}


def test_code_beside_a_checkpoint_is_never_run(tmp_path):
    with_config(tmp_path, **NO_MODEL["remote-code"][0])
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    with pytest.warns(UserWarning, match="makes no model"):
        scan(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00", "[]", '"x"'])
def test_damaged_config_is_no_reason_to_stop(text, tmp_path):
    with_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.warns(UserWarning, match=r"config\.json beside it is"):
        assert len(scan(tmp_path)) == 2


def test_without_transformers_the_warning_says_so(tmp_path, monkeypatch):
    make("ViTForImageClassification").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match=r"needs transformers, which is not installed"):
        scan(tmp_path)


def test_checkpoint_whose_layers_leave_no_doubt_warns_of_nothing(tmp_path, recwarn):
    save_file({"a.weight": torch.randn(4, 3)}, tmp_path / "w.safetensors")
    scan(tmp_path / "w.safetensors")
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.mark.parametrize("prefix", ["module.", "net."])
@pytest.mark.filterwarnings("error::UserWarning")
def test_prefix_of_a_wrapper_does_not_keep_the_config_from_being_used(prefix, tmp_path):
    model = make("MixtralForCausalLM")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    scan(tmp_path).check(model)


def test_groups_choose_among_the_loaded_names(tmp_path):
    make("MixtralForCausalLM").save_pretrained(tmp_path)
    names = set(rows_of(scan(tmp_path, include=["@experts"])))
    assert names == {f"model.layers.{i}.mlp.experts.{kind}_proj" for i in (0, 1) for kind in ("gate_up", "down")}


def test_quantized_tensor_of_a_configured_model_is_refused_unless_it_is_excluded(tmp_path):
    model = make("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} .*quantized"):
        scan(tmp_path)
    assert name not in scan(tmp_path, exclude=[name])
