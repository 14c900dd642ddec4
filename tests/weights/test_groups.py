"""Groups of parameters wherever a glob is taken."""

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kappa_lightning import KappaFreezeCallback, KappaMonitor, KappaProfile
from kappa_lightning.weights import check_patterns, match_names, match_parameters, plain_parameters
from kappa_lightning.weights.groups import GROUPS


class Tabular(nn.Module):
    """Layers whose names say nothing, or something else than they are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.embed = nn.Linear(3, 8)
        self.embedding_net = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(1, 2, 3))
        self.mixer = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 1, enable_nested_tensor=False)
        self.swiglu = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate", "up", "down")})
        self.attn_norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.table.weight


def test_where_the_module_is_at_hand_its_layers_decide():
    module = Tabular()
    groups = {group: match_parameters(module, [group], argument="exclude") for group in GROUPS}
    assert groups["@embeddings"] == {"table.weight"}
    assert groups["@router"] == groups["@head"] == set()
    mixer = {name for name in plain_parameters(module) if name.startswith("mixer.")}
    own = {name for name in plain_parameters(module) if "self_attn" in name}
    assert len(mixer) == len(own) == 4
    assert groups["@attention"] == mixer | own
    assert groups["@mlp"] == {f"encoder.layers.0.linear{i}.{end}" for i in (1, 2) for end in ("weight", "bias")}


def test_head_that_is_tied_to_an_embedding_is_embedding_whichever_comes_first():
    net = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4)})
    net["head"].weight = net["table"].weight
    assert match_parameters(net, ["@embeddings"], argument="include") == {"head.weight"}
    assert match_parameters(net, ["@head"], argument="exclude") == set()


def test_empty_group_is_an_error_except_in_exclude():
    net = nn.Sequential(nn.Linear(3, 3))
    assert match_parameters(net, ["@embeddings", "0.bias"], argument="exclude") == {"0.bias"}
    for argument in ("include", "always_train", "tensors"):
        with pytest.raises(ValueError, match=rf"^{argument}: .*nothing of the group '@embeddings' \(.*0\.weight"):
            match_parameters(net, ["@embeddings"], argument=argument)
    with pytest.raises(ValueError, match=r"exclude: the pattern 'head\.\*'"):
        match_parameters(net, ["@head", "head.*"], argument="exclude")


def test_group_that_only_a_tied_head_would_be_in_says_so():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8))
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to transformer\.wte\.weight.*counts as embedding"):
        match_parameters(model, ["@head"], argument="always_train")


@pytest.mark.parametrize("argument", ["include", "exclude", "always_train"])
def test_unknown_group_is_an_error_that_lists_the_groups(argument):
    with pytest.raises(ValueError) as caught:
        match_names(["a.weight"], ["@atention"], argument=argument, aliases={})
    for part in (argument, "'@atention'", *GROUPS):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=rf"{argument}.*@atention.*@attention"):
        KappaFreezeCallback(**{argument: ["@atention"]})


@pytest.mark.parametrize("patterns", [[3], [None], [["*"]]])
def test_pattern_that_is_no_string_is_an_error_that_names_it(patterns):
    with pytest.raises(TypeError, match=r"include holds"):
        check_patterns(patterns, argument="include")


def test_groups_and_globs_join():
    names = ["wte.weight", "h.0.attn.c_proj.weight", "h.1.attn.c_proj.weight", "h.0.mlp.c_proj.weight"]
    chosen = match_names(names, ["@embeddings", "h.1.*", "@down"], argument="include", aliases={})
    assert chosen == {"wte.weight", "h.1.attn.c_proj.weight", "h.0.mlp.c_proj.weight"}


def test_parametrized_layer_stays_in_its_group():
    net = nn.ModuleDict({"self_attn": nn.ModuleDict({"k_proj": weight_norm(nn.Linear(4, 4))}), "x": nn.Linear(4, 4)})
    found = match_parameters(net, ["@attention"], argument="include")
    assert found == {name for name in plain_parameters(net) if name.startswith("self_attn.")}


def test_compiled_embedding_stays_an_embedding():
    net = nn.ModuleDict({"table": torch.compile(nn.Embedding(5, 4), backend="eager"), "x": nn.Linear(4, 4)})
    assert match_parameters(net, ["@embeddings"], argument="include") == {"table.weight"}


def test_profile_of_a_model_and_of_its_file_take_groups(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path)
    options = {"include": ["@attention", "@down"], "exclude": ["*o_proj*", "@router"], "progress": False}
    of_model = KappaProfile.from_model(model, **options)
    assert [row.name.rpartition(".")[0].rpartition(".")[2] for row in of_model] == [
        "q_proj", "k_proj", "v_proj", "down_proj",
    ]  # fmt: skip
    assert {row.name for row in KappaProfile.from_checkpoint(tmp_path, **options)} == {row.name for row in of_model}


class Classifier(BoringModel):
    def __init__(self):
        super().__init__()
        del self.layer
        self.table = nn.Embedding(5, 32)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(32, 32), "down_proj": nn.Linear(32, 32)})
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.mlp["down_proj"](self.mlp["up_proj"](x + self.table.weight.sum(0))))


def test_groups_are_plain_strings_in_the_yaml_of_a_command_line(tmp_path):
    callbacks = [
        {
            "class_path": "kappa_lightning.KappaFreezeCallback",
            "init_args": {
                "top_p": 1.0, "include": ["@mlp"], "exclude": ["@embeddings", "@down"], "always_train": ["@head"],
            },
        },
        {"class_path": "kappa_lightning.KappaMonitor", "init_args": {"tensors": ["@gate_up", "@head"]}},
    ]  # fmt: skip
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False, "accelerator": "cpu"}  # fmt: skip
    config = {"trainer": {"max_steps": 1, "callbacks": callbacks, "default_root_dir": str(tmp_path), **quiet}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        Classifier, save_config_callback=None, args=["fit", "--config", str(tmp_path / "config.yaml")],
    )  # fmt: skip
    freeze = next(callback for callback in cli.trainer.callbacks if isinstance(callback, KappaFreezeCallback))
    monitor = next(callback for callback in cli.trainer.callbacks if isinstance(callback, KappaMonitor))
    assert freeze.trained_names == ["mlp.up_proj.weight", "head.weight", "head.bias"]
    assert set(monitor.baseline) == {"mlp.up_proj.weight", "head.weight"}


def test_pattern_without_the_name_in_front_is_told_what_would_match():
    with pytest.raises(ValueError, match=r"'fc\.\*' matches no parameter; '\*\.fc\.\*' would match model\.fc\.weight"):
        match_names(["model.conv.weight", "model.fc.weight"], ["fc.*"], argument="always_train", aliases={})
