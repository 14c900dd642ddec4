"""Missing, damaged, foreign and quantized checkpoints are errors that name the file or the tensor."""

import json
import os
import socket
import sys

import huggingface_hub
import pytest
import torch
from checkpoint_files import INDEX, Net, profile_of, write_lightning, write_safetensors, write_shards, write_state_dict
from safetensors.torch import save_file
from torch import nn


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


def test_without_huggingface_hub_a_missing_path_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"org/name.*huggingface_hub is not installed"):
        profile_of("org/name")
