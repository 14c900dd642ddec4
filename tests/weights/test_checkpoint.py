import json
import os
import shutil
import socket
import sys
import weakref
from pathlib import Path

import huggingface_hub
import lightning.pytorch as pl
import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kappa_lightning import KappaProfile

INDEX = "model.safetensors.index.json"


class Net(pl.LightningModule):
    """Every kind of matrix that a checkpoint can hold, and vectors of several shapes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.depthwise_conv = nn.Conv1d(6, 6, 3, groups=6)
        self.patches = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 8)
        self.half = nn.Linear(8, 6).to(torch.bfloat16)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.experts_bias = nn.Parameter(torch.randn(3, 4))
        self.position = nn.Parameter(torch.randn(1, 7, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.register_buffer("steps", torch.arange(12).reshape(3, 4))


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


def profile_of(path, **options):
    return KappaProfile.from_checkpoint(path, progress=False, **options)


def rows_of(profile):
    return {row.name: row for row in profile}


def numpy_kappas(tensor):
    array = tensor.detach().double().numpy()
    matrices = array if array.ndim == 3 else array.reshape(1, array.shape[0], -1)
    sigma = np.linalg.svd(matrices, compute_uv=False)
    return sigma[:, 0] / sigma[:, -1]


def write_safetensors(module, folder):
    save_file(module.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def write_folder(module, folder):
    save_file(module.state_dict(), folder / "model.safetensors")
    return folder


def write_shards(module, folder, tensors_each=3):
    state = list(module.state_dict().items())
    shards = [dict(state[start : start + tensors_each]) for start in range(0, len(state), tensors_each)]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def write_lightning(module, folder):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def write_state_dict(module, folder):
    torch.save(module.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


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


@pytest.mark.parametrize(
    "path", ["missing.safetensors", "folder/missing.ckpt", "/no/such/folder", "org/no-such-model", "a/b/c/d", "-x-"]
)
def test_missing_path_is_a_file_not_found_error_that_names_it(path, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    with pytest.raises(FileNotFoundError) as caught:
        profile_of(path)
    assert path in str(caught.value)
    assert "cache" in str(caught.value)


def _no_network(*args):
    raise AssertionError("a checkpoint is never looked up on the network")


def test_folder_without_weights_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*name the checkpoint file"):
        profile_of(tmp_path)


def test_missing_shard_is_an_error_that_names_it_before_anything_is_decomposed(tmp_path, decomposed):
    write_shards(Net(), tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        profile_of(tmp_path)
    assert not decomposed


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '"text"',
        '{"weight_map": 3}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {}}',
    ],
)
def test_damaged_index_is_an_error_that_names_it(content, tmp_path):
    write_shards(Net(), tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError) as caught:
        profile_of(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tensor_that_its_shard_lacks_is_an_error_that_names_both(tmp_path, decomposed):
    write_shards(Net(), tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["late.weight"] = shard.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{shard.name} lacks late\.weight, which .*index\.json"):
        profile_of(tmp_path)
    assert not decomposed


def test_missing_shard_is_named_with_a_tensor_that_it_should_hold(tmp_path):
    write_shards(Net(), tmp_path)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    first = next(name for name, place in weight_map.items() if place == shard.name)
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} for {first}\b"):
        profile_of(tmp_path)


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


def test_index_that_is_no_text_is_an_error_that_names_it(tmp_path):
    write_shards(Net(), tmp_path)
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"index\.json"):
        profile_of(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.9999])
def test_truncated_safetensors_file_is_an_error_that_names_it(share, tmp_path):
    path = write_safetensors(Net(), tmp_path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"weights\.safetensors is corrupt or truncated"):
        profile_of(path)


def test_damaged_shard_is_an_error_that_names_it(tmp_path):
    write_shards(Net(), tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=shard.name):
        profile_of(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_pickle_is_an_error_that_names_it(share, tmp_path):
    path = write_lightning(Net(), tmp_path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        profile_of(path)


def test_file_of_another_kind_is_an_error_that_names_it(tmp_path):
    (tmp_path / "notes.txt").write_text("κ of everything is 1")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        profile_of(tmp_path / "notes.txt")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_pickle_that_would_run_code_is_refused_and_runs_none(place, tmp_path):
    evil, weight = Malicious(tmp_path / "was-run"), torch.randn(3, 3)
    contents = {
        "beside": {"state_dict": {"a.weight": weight}, "callbacks": evil},
        "inside": {"a.weight": weight, "b.weight": evil},
        "alone": evil,
    }
    torch.save(contents[place], tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt.*without running its code"):
        profile_of(tmp_path / "evil.ckpt")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], 3, {}, {"state_dict": [1]}, {"state_dict": {}}, {1: torch.ones(3, 3)}, {"epoch": 3}], ids=repr
)
def test_pickle_without_weights_is_an_error_that_names_it(content, tmp_path):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt holds no"):
        profile_of(tmp_path / "other.ckpt")


def test_pickled_module_is_refused_and_told_to_save_its_state_dict(tmp_path):
    torch.save(nn.Linear(3, 3), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"(?s)module\.pt.*save its state_dict alone"):
        profile_of(tmp_path / "module.pt")


def test_state_dict_in_the_format_before_torch_1_6_is_read(tmp_path):
    net = nn.ModuleDict({"first": nn.Linear(5, 4)})
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert rows_of(profile_of(tmp_path / "old.pth")) == rows_of(KappaProfile.from_model(net, progress=False))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layer.weight", torch.ones(4, 3, dtype=torch.int8)),
        ("layer.weight", torch.ones(4, 3, dtype=torch.uint8)),
        ("layer.qweight", torch.ones(4, 3, dtype=torch.int32)),
        # bitsandbytes packs a 4-bit weight into one column of bytes.
        ("layer.weight", torch.ones(24, 1, dtype=torch.uint8)),
    ],
    ids=["int8", "uint8", "gptq", "bitsandbytes-4bit"],
)
def test_quantized_weight_is_an_error_that_names_it(name, tensor, suffix, tmp_path):
    state = {"norm.weight": torch.ones(4), "other.weight": torch.randn(3, 3), name: tensor}
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    with pytest.raises(ValueError) as caught:
        profile_of(path)
    for part in (name, str(tensor.dtype).removeprefix("torch."), "quantized", "from_model"):
        assert part in str(caught.value)


def test_weight_that_is_scaled_block_by_block_is_an_error_that_names_it(tmp_path):
    # DeepSeek-V3's files: the float8 numbers are not the weight, whose blocks have a scale each.
    state = {"w.weight": torch.randn(8, 8).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.rand(2, 2)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.weight .*quantized"):
        profile_of(tmp_path / "w.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("write", [write_safetensors, write_shards, write_state_dict])
def test_entry_that_is_not_finite_is_an_error_that_names_the_tensor(bad, write, tmp_path):
    net = Net()
    with torch.no_grad():
        net.conv.weight[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"^conv\.weight\b.*NaN or infinite"):
        profile_of(write(net, tmp_path))


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


def test_without_huggingface_hub_a_missing_path_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"org/name.*huggingface_hub is not installed"):
        profile_of("org/name")
