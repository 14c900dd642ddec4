"""What people have on disk: files of transformers, diffusers, PEFT, DataParallel, Lightning and their own scripts."""

import argparse
import json
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import KappaFreezeCallback, KappaProfile

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def scan(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the layouts that are assumed
        return KappaProfile.from_checkpoint(path, progress=False, **options)


def rows_of(profile):
    return {row.name: row for row in profile}


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))


def of_model(module):
    return rows_of(KappaProfile.from_model(module, progress=False))


SINGLE = [
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "adapter_model.safetensors", "adapter_model.bin", "last.ckpt", "own.pth", "own.safetensors",
]  # fmt: skip


def save(state, file):
    (save_file if file.suffix == ".safetensors" else torch.save)(state, file)


@pytest.mark.parametrize("name", SINGLE)
def test_folder_is_read_by_the_name_of_the_file_in_it(name, tmp_path):
    save(network().state_dict(), tmp_path / name)
    torch.save({"lr": 1e-3}, tmp_path / "training_args.bin")
    torch.save({"step": torch.ones(3, 3)}, tmp_path / "optimizer.pt")
    assert rows_of(scan(tmp_path)) == of_model(network())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_shards_are_read_by_their_index_each_name_from_its_own_shard(name, tmp_path):
    state = network().state_dict()
    stem, _, suffix = name.partition(".")
    shards = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    weight_map = {key: shards[key.startswith("3.")] for key in state}
    for shard in shards:
        held = {key: value for key, value in state.items() if weight_map[key] == shard}
        # Left over from another version: the index says that it is in the other shard.
        stale = {"3.weight": torch.ones(3, 5)} if shard == shards[0] else {"0.weight": torch.ones(5, 6)}
        save({**held, **stale, "not_indexed.weight": torch.ones(4, 4)}, tmp_path / shard)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert rows_of(scan(tmp_path)) == of_model(network())


def test_shard_of_vectors_alone_is_read(tmp_path):
    state = network().state_dict()
    shards = {key: f"pytorch_model-{number}.bin" for number, key in enumerate(state)}
    for key, shard in shards.items():
        torch.save({key: state[key]}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert rows_of(scan(tmp_path)) == of_model(network())


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/secret.safetensors", "sub/secret.safetensors", "..", ".", "",
              "..\\secret.safetensors", "C:secret.safetensors", "C:\\secret.safetensors"],
)  # fmt: skip
def test_index_that_leads_out_of_its_folder_is_refused(shard, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a.weight": torch.randn(3, 3)}, tmp_path / "secret.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(ValueError, match=r"as the shard of a\.weight, which does not lie beside it"):
        scan(inside)


KEYS = ["state_dict", "model_state_dict", "model_state", "model", "net", "params_ema", "generator"]


@pytest.mark.parametrize("key", KEYS)
def test_state_dict_is_found_under_the_only_key_that_holds_one(key, tmp_path):
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, key: net.state_dict(), "optimizer": optimizer.state_dict(), "loss": torch.tensor(2.0)}
    torch.save(content, tmp_path / "own.pt")
    assert rows_of(scan(tmp_path / "own.pt")) == of_model(net)


@pytest.mark.parametrize("wrap", [lambda s: [s], lambda s: (s,), lambda s: {"a": {"b": s}}, lambda s: [{"model": s}]])
def test_state_dict_that_is_nested_deeper_or_alone_in_a_list_is_found(wrap, tmp_path):
    net = network()
    torch.save(wrap(net.state_dict()), tmp_path / "own.pt")
    assert rows_of(scan(tmp_path / "own.pt")) == of_model(net)


@pytest.mark.parametrize(
    ("content", "keys", "how"),
    [
        (lambda s: {"params": s, "params_ema": s, "step": 3}, r"\(params, params_ema\)", r"\['params'\]"),
        (lambda s: [s, s], r"\(0, 1\)", r"\[0\]"),
        (lambda s: {"gan": {"generator": s, "critic": s}}, r"\(gan\.generator, gan\.critic\)",
         r"\['gan'\]\['generator'\]"),
    ],
)  # fmt: skip
def test_several_state_dicts_are_an_error_that_lists_their_keys_and_says_how_to_go_on(content, keys, how, tmp_path):
    torch.save(content(network().state_dict()), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=rf"own\.pt holds 2 state_dicts {keys}: save .*{how}"):
        scan(tmp_path / "own.pt")


def test_file_without_a_state_dict_lists_its_keys(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt holds no state_dict .*its keys are 'epoch', 'lr'"):
        scan(tmp_path / "own.pt")


class Module(pl.LightningModule):
    """Holds a network under a name of its choice, or is one itself."""

    def __init__(self, attribute):
        super().__init__()
        self.inner = attribute
        if attribute:
            self.add_module(attribute, network())
        else:
            for name, layer in network().named_children():
                self.add_module(name, layer)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for layer in (self.get_submodule(self.inner) if self.inner else self).children():
            x = layer(x) if layer is not self.head else x
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


PREFIXES = ["", "module.", "model.", "net.", "module.net."]


@pytest.mark.parametrize("in_file", PREFIXES)
@pytest.mark.parametrize("attribute", ["", "model", "net"])
def test_scan_serves_the_callback_whichever_prefix_file_and_model_have(in_file, attribute, tmp_path):
    state = {f"{in_file}{name}": tensor for name, tensor in network().state_dict().items()}
    torch.save(state, tmp_path / "own.pt")
    profile = scan(tmp_path / "own.pt")
    profile.save(tmp_path / "kappa.json")
    module = Module(attribute)
    callback = KappaFreezeCallback(
        num_tensors=1, exclude=["head.*"], always_train=["head.*"], profile=tmp_path / "kappa.json"
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(4, 6))))
    prefix = f"{attribute}." if attribute else ""
    lowest = min(of_model(network()).values(), key=lambda row: row.kappa).name
    assert callback.selected_names == [f"{prefix}{lowest}"]
    assert len(callback.profile) == 3


def test_profile_of_other_weights_is_refused_whatever_its_prefix(tmp_path):
    torch.save({f"module.{name}": 2 * tensor for name, tensor in network().state_dict().items()}, tmp_path / "own.pt")
    renamed = scan(tmp_path / "own.pt").renamed_for([f"net.{name}" for name in of_model(network())])
    with pytest.raises(ValueError, match=r"content of net\.0\.weight differs"):
        renamed.check(Module("net"))


def test_adapter_of_peft_has_the_names_of_the_model_that_loads_it(tmp_path):
    peft = pytest.importorskip("peft")
    net = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "table": nn.Embedding(9, 6)})
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj", "table"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    rows = rows_of(scan(tmp_path))
    expected = {name: row for name, row in of_model(model).items() if "lora_" in name}
    assert rows == expected
    assert len(rows) == 4


def test_distributed_checkpoint_says_how_to_put_it_together_which_then_works(tmp_path):
    net = network()
    distributed_checkpoint.save({"state_dict": net.state_dict()}, checkpoint_id=tmp_path / "parts", no_dist=True)
    with pytest.raises(ValueError) as caught:
        scan(tmp_path / "parts")
    command = f"torch.distributed.checkpoint.format_utils dcp_to_torch {tmp_path / 'parts'} weights.pt"
    assert command in str(caught.value)
    dcp_to_torch_save(tmp_path / "parts", tmp_path / "weights.pt")  # what the command does
    assert rows_of(scan(tmp_path / "weights.pt")) == of_model(net)
    (tmp_path / "parts" / "meta.pt").touch()
    with pytest.raises(ValueError, match=r"lightning\.pytorch\.utilities\.consolidate_checkpoint"):
        scan(tmp_path / "parts")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("zero_to_fp32.py", r"DeepSpeed.*zero_to_fp32\.py"),
        ("model_index.json", r"pipeline of several models.*unet"),
        ("two.pt", r"it holds one\.pt, two\.pt: name the checkpoint file"),
    ],
)
def test_other_folders_say_what_to_do(file, what, tmp_path):
    for name in ("one.pt", file):
        (tmp_path / name).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        scan(tmp_path)


@pytest.mark.parametrize("suffix", [".gguf", ".onnx", ".h5", ".msgpack"])
def test_files_of_other_libraries_say_what_to_do(suffix, tmp_path):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"model\{suffix} is no file of PyTorch's: \w+"):
        scan(file)


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(1, 6))])
def test_torchscript_says_what_it_is_and_what_to_do(make, tmp_path):
    torch.jit.save(make(network()), tmp_path / "scripted.pt")
    with pytest.raises(ValueError, match=r"scripted\.pt is a TorchScript archive: load it with torch\.jit\.load"):
        scan(tmp_path / "scripted.pt")


@pytest.mark.parametrize("name", ["program.pt2", "arrays.npz"])
def test_other_archives_say_that_they_are_no_checkpoint(name, tmp_path):
    if name == "program.pt2":
        torch.export.save(torch.export.export(network(), (torch.ones(1, 6),)), tmp_path / name)
    else:
        np.savez(tmp_path / name, a=np.eye(3))
    with pytest.raises(ValueError, match=rf"{name} is an exported program or an archive of NumPy: load it with"):
        scan(tmp_path / name)


class Settings:
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [(argparse.Namespace(lr=0.1), "argparse.Namespace"), (Settings(), "Settings"), (nn.ReLU(), "ReLU")],
)
def test_hyperparameters_that_need_code_are_named_with_the_way_on(value, named, tmp_path):
    torch.save({"state_dict": network().state_dict(), "hyper_parameters": {"args": value}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError) as caught:
        scan(tmp_path / "last.ckpt")
    for part in (named, "without running its code", "add_safe_globals", "state_dict"):
        assert part in str(caught.value)


def test_the_way_on_works(tmp_path):
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": network().state_dict(), "hyper_parameters": argparse.Namespace(lr=0.1)}, file)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert rows_of(scan(file)) == of_model(network())
    torch.save(torch.load(file, weights_only=False)["state_dict"], tmp_path / "weights.pt")
    assert rows_of(scan(tmp_path / "weights.pt")) == of_model(network())


def normalized(kind):
    torch.manual_seed(6)
    older = {"weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm}
    if kind.startswith("older-"):
        wrap = older[kind.removeprefix("older-")]
    elif kind == "pruned":

        def wrap(layer):
            return prune.l1_unstructured(layer, "weight", amount=5)
    else:
        wrap = {"weight_norm": weight_norm, "spectral_norm": spectral_norm}[kind]
    layers = [nn.Linear(6, 5), nn.Conv1d(4, 6, 3), nn.Conv2d(3, 4, (2, 3))]
    if "spectral" in kind:
        layers.append(nn.ConvTranspose2d(4, 3, 2))
    net = nn.ModuleList([wrap(layer) for layer in layers])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter.mul_(torch.logspace(0, 2, parameter.numel()).view_as(parameter))
    return net.eval()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", ["weight_norm", "older-weight_norm", "spectral_norm", "older-spectral_norm", "pruned"])
def test_normalized_and_pruned_weights_are_those_that_the_layers_use(kind, suffix, tmp_path):
    net = normalized(kind)
    save(net.state_dict(), tmp_path / f"w.{suffix}")
    profile = scan(tmp_path / f"w.{suffix}")
    assert rows_of(profile) == of_model(net)
    profile.check(net)


THIN = {
    "one-channel": nn.Conv2d(5, 1, 1), "one-channel-1d": nn.Conv1d(5, 1, 1), "one-input": nn.Conv2d(1, 5, 1),
    "lstm": nn.LSTM(1, 3, bidirectional=True), "cell": nn.GRUCell(1, 3), "linear": nn.Linear(5, 1),
    "attention": nn.MultiheadAttention(1, 1), "norm": nn.LayerNorm((3, 4)), "empty": nn.Linear(0, 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", THIN)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_thin_layers_count_alike_in_a_file_and_in_the_model(kind, tmp_path):
    net = nn.ModuleDict({"norm" if kind == "norm" else "conv": THIN[kind], "full": nn.Linear(3, 3)})
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert rows_of(scan(tmp_path / "w.safetensors")) == of_model(net)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_complex_weights_of_a_file_are_those_of_the_model(suffix, tmp_path):
    net = nn.ModuleDict({"fourier": nn.Linear(5, 4, dtype=torch.complex64), "plain": nn.Linear(4, 4)})
    save(net.state_dict(), tmp_path / f"w.{suffix}")
    assert rows_of(scan(tmp_path / f"w.{suffix}")) == of_model(net)
    assert len(of_model(net)) == 2
