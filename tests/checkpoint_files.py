"""A module with every kind of matrix, and its checkpoint in each form, for the tests of reading them."""

import json

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file
from torch import nn

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


def profile_of(path, **options):
    return KappaProfile.from_checkpoint(path, progress=False, **options)


def rows_of(profile):
    return {row.name: row for row in profile}


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
