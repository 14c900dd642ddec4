"""What is read from checkpoints in each of their forms."""

import shutil
import socket
import weakref
from pathlib import Path

import huggingface_hub
import lightning.pytorch as pl
import numpy as np
import pytest
import safetensors
import torch
from checkpoint_files import (
    Net,
    profile_of,
    rows_of,
    write_folder,
    write_lightning,
    write_safetensors,
    write_shards,
    write_state_dict,
)
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kappa_lightning import KappaProfile

MATRICES = {
    "embed.weight",
    "conv.weight",
    "depthwise_conv.weight",
    "patches.weight",
    "hidden.weight",
    "half.weight",
    "experts",
    "position",
}


def numpy_kappas(tensor):
    array = tensor.detach().double().numpy()
    matrices = array if array.ndim == 3 else array.reshape(1, array.shape[0], -1)
    sigma = np.linalg.svd(matrices, compute_uv=False)
    return sigma[:, 0] / sigma[:, -1]


WRITERS = [write_safetensors, write_folder, write_shards, write_lightning, write_state_dict]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("as_text", [False, True])
def test_rows_are_those_of_the_model(write, as_text, tmp_path):
    net = Net()
    path = write(net, tmp_path)
    profile = profile_of(str(path) if as_text else path)
    assert {row.name for row in profile} == MATRICES
    assert rows_of(profile) == rows_of(KappaProfile.from_model(net, progress=False))


@pytest.mark.parametrize("write", WRITERS)
def test_kappas_are_those_of_numpy(write, tmp_path):
    net = Net()
    profile = profile_of(write(net, tmp_path), rtol=1e-6)
    for name, tensor in net.state_dict().items():
        if name == "experts":
            np.testing.assert_allclose(profile[name].kappas, numpy_kappas(tensor), rtol=1e-6)
        elif name in MATRICES:
            reference = numpy_kappas(tensor.flatten(1) if "conv" in name else tensor)
            np.testing.assert_allclose([profile[name].kappa], reference, rtol=1e-6, err_msg=name)
            assert profile[name].kappas is None


@pytest.mark.parametrize("write", WRITERS)
def test_profile_of_a_checkpoint_passes_the_check_of_its_model_only(write, tmp_path):
    net = Net()
    profile = profile_of(write(net, tmp_path))
    profile.check(net)
    with torch.no_grad():
        net.hidden.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        profile.check(net)


def test_sharded_folder_of_transformers_has_the_rows_of_its_model(tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=31,
        )
    )  # fmt: skip
    llama.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    profile = profile_of(tmp_path)
    assert rows_of(profile) == rows_of(KappaProfile.from_model(llama, progress=False))
    assert "model.layers.1.self_attn.q_proj.weight" in profile
    profile.check(llama)


def test_folder_prefers_its_index_to_a_single_file_that_is_left_over(tmp_path):
    write_shards(Net(), tmp_path)
    save_file({"stale.weight": torch.randn(3, 3)}, tmp_path / "model.safetensors")
    assert "stale.weight" not in profile_of(tmp_path)


def test_index_is_followed_and_not_the_files_that_lie_around(tmp_path):
    net = Net()
    write_shards(net, tmp_path)
    save_file({"stale.weight": torch.randn(3, 3)}, tmp_path / "model-00009-of-00009.safetensors")
    assert {row.name for row in profile_of(tmp_path)} == MATRICES


def test_layer_with_one_output_has_a_row_as_in_the_model(tmp_path):
    net = nn.ModuleDict({"body": nn.Linear(5, 4), "head": nn.Linear(4, 1), "scale": nn.Embedding(6, 1)})
    expected = KappaProfile.from_model(net, progress=False)
    assert "head.weight" in expected
    assert rows_of(profile_of(write_safetensors(net, tmp_path))) == rows_of(expected)


def test_tied_weights_of_a_state_dict_pass_the_check_of_their_model(tmp_path):
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    profile_of(write_state_dict(net, tmp_path)).check(net)


def test_compiled_part_of_a_lightning_checkpoint_goes_by_its_plain_names(tmp_path):
    net = Net()
    net.hidden = torch.compile(net.hidden, backend="eager")
    path = write_lightning(net, tmp_path)
    assert "hidden._orig_mod.weight" in torch.load(path, weights_only=True)["state_dict"]
    profile = profile_of(path)
    assert {row.name for row in profile} == MATRICES
    profile.check(net)


def test_three_dimensions_are_a_stack_unless_the_name_tells_of_a_convolution(tmp_path):
    tensor = torch.randn(3, 4, 5)
    names = ["experts.up", "encoder.conv1.weight", "Conv1d_0.weight", "downsampleCONV.weight"]
    save_file({name: tensor.clone() for name in names}, tmp_path / "w.safetensors")
    profile = profile_of(tmp_path / "w.safetensors", rtol=1e-6)
    np.testing.assert_allclose(profile["experts.up"].kappas, numpy_kappas(tensor), rtol=1e-6)
    for name in names[1:]:
        assert profile[name].kappas is None
        np.testing.assert_allclose([profile[name].kappa], numpy_kappas(tensor.flatten(1)), rtol=1e-6)


def test_vectors_integer_buffers_and_biases_have_no_row(tmp_path):
    tensors = {
        "layer.weight": torch.randn(3, 4),
        "layer.bias": torch.randn(3),
        "experts.bias": torch.randn(3, 4),
        "token": torch.randn(1, 1, 4),
        "position_ids": torch.arange(8).reshape(2, 4),
        "attention_mask": torch.ones(4, 4, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    assert [row.name for row in profile_of(tmp_path / "w.safetensors")] == ["layer.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_stored_precision_is_read_as_it_is(dtype, suffix, tmp_path):
    tensor = torch.randn(6, 4).to(dtype)
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({"w.weight": tensor}, path)
    row = profile_of(path, rtol=1e-6)["w.weight"]
    assert row.dtype == str(dtype).removeprefix("torch.")
    np.testing.assert_allclose([row.kappa], numpy_kappas(tensor), rtol=1e-6)


def test_include_and_exclude_are_globs_over_the_names_in_the_checkpoint(tmp_path):
    path = write_safetensors(Net(), tmp_path)
    profile = profile_of(path, include=["*conv*", "h*"], exclude=["half.*"])
    assert {row.name for row in profile} == {"conv.weight", "depthwise_conv.weight", "hidden.weight"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_without_a_match_is_an_error_that_names_it(argument, tmp_path):
    path = write_safetensors(Net(), tmp_path)
    with pytest.raises(ValueError, match=rf"{argument}.*'decoder\.\*'"):
        profile_of(path, **{argument: ["decoder.*"]})


def test_patterns_that_leave_nothing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no matrix to profile"):
        profile_of(write_safetensors(Net(), tmp_path), exclude=["*"])


def test_excluded_tensors_are_never_read(tmp_path, reads):
    profile_of(write_shards(Net(), tmp_path), include=["hidden.*"])
    assert [name for name, _ in reads] == ["hidden.weight"]


@pytest.fixture
def reads(monkeypatch):
    """(name, number of tensors alive right after) of each tensor that is read from a safetensors file."""
    seen, alive = [], []
    original = safetensors.safe_open

    class Spy:
        def __init__(self, *args, **options):
            self.file = original(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            seen.append((name, sum(reference() is not None for reference in alive)))
            return tensor

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    return seen


@pytest.mark.parametrize("write", [write_safetensors, write_shards])
def test_each_tensor_is_read_once_and_let_go_before_the_next(write, tmp_path, reads):
    profile_of(write(Net(), tmp_path))
    assert {name for name, _ in reads} == MATRICES
    assert [count for _, count in reads] == [1] * len(MATRICES)


def test_pickled_tensors_are_mapped_and_not_loaded(tmp_path, monkeypatch):
    path, options = write_lightning(Net(), tmp_path), []
    original = torch.load

    def load(*args, **given):
        options.append(given)
        return original(*args, **given)

    monkeypatch.setattr(torch, "load", load)
    profile_of(path)
    assert [(given["mmap"], given["weights_only"]) for given in options] == [(True, True)]


class Rotary(pl.LightningModule):
    """A weight, and two buffers of which one is in the checkpoint."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("cache", torch.randn(8, 3))
        self.register_buffer("scratch", torch.randn(8, 3), persistent=False)


@pytest.mark.parametrize("write", WRITERS)
def test_buffer_of_a_checkpoint_has_a_row_and_the_check_passes_over_it(write, tmp_path):
    net = Rotary()
    profile = profile_of(write(net, tmp_path))
    assert set(rows_of(profile)) == {"layer.weight", "cache"}
    profile.check(net)
    net.cache.mul_(2)  # no weight: what it holds now is no concern
    profile.check(net)
    with torch.no_grad():
        net.layer.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"content of layer\.weight differs"):
        profile.check(net)


def test_row_of_a_buffer_that_the_module_lacks_or_has_in_another_shape_is_refused(tmp_path):
    net = Rotary()
    profile = profile_of(write_safetensors(net, tmp_path))
    net.cache = torch.randn(9, 3)
    with pytest.raises(ValueError, match="cache, which this model has not"):
        profile.check(net)
    del net.cache
    with pytest.raises(ValueError, match="cache, which this model has not"):
        profile.check(net)


def test_buffer_can_be_left_out_by_name(tmp_path):
    profile = profile_of(write_safetensors(Rotary(), tmp_path), exclude=["cache"])
    assert set(rows_of(profile)) == {"layer.weight"}


def test_experts_that_transformers_stores_one_by_one_and_fuses_are_refused_with_the_reason(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=20, num_hidden_layers=1, num_local_experts=2, **sizes)
    mixtral = MixtralForCausalLM(config)
    mixtral.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    profile = profile_of(tmp_path)
    reason = r"one by one \(.*experts\.0\.w1\.weight\).*fused \(.*experts\.gate_up_proj\).*from_model"
    with pytest.raises(ValueError, match=reason):
        profile.check(mixtral)
    with pytest.raises(ValueError, match=reason):
        profile.renamed_for(["model.layers.0.mlp.experts.gate_up_proj"])


def test_state_dict_in_the_format_before_torch_1_6_is_read(tmp_path):
    net = nn.ModuleDict({"first": nn.Linear(5, 4)})
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert rows_of(profile_of(tmp_path / "old.pth")) == rows_of(KappaProfile.from_model(net, progress=False))


def hub_cache(home, model, snapshots, main):
    """The layout that huggingface_hub keeps: blobs, snapshots of links to them, and the commit of each branch."""
    repository = home / "hub" / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text(main)
    for revision, module in snapshots.items():
        folder = repository / "snapshots" / revision
        folder.mkdir(parents=True)
        write_folder(module, folder)
        blob = repository / "blobs" / f"{revision}-weights"
        shutil.move(folder / "model.safetensors", blob)
        (folder / "model.safetensors").symlink_to(Path("..", "..", "blobs", blob.name))
    return home / "hub"


def test_hub_id_is_read_from_the_cache_at_the_commit_of_main_without_a_network(tmp_path, monkeypatch):
    old, new = Net(), Net()
    cache = hub_cache(tmp_path, "org/name", {"a" * 40: old, "b" * 40: new}, main="b" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    profile = profile_of("org/name")
    assert rows_of(profile) == rows_of(KappaProfile.from_model(new, progress=False))
    profile.check(new)
    with pytest.raises(ValueError, match=r"other weights"):
        profile.check(old)


def test_folder_of_the_same_name_comes_before_the_hub_cache(tmp_path, monkeypatch):
    here, cached = Net(), Net()
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HF_HUB_CACHE",
        str(hub_cache(tmp_path, "org/name", {"a" * 40: cached}, main="a" * 40)),
    )
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_folder(here, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    profile_of("org/name").check(here)


def _no_network(*args):
    raise AssertionError("a checkpoint is never looked up on the network")
