"""A checkpoint of diffusers is read as the model that diffusers makes of the config beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.weights import checkpoint_weights, find_weights

diffusers = pytest.importorskip("diffusers")


def unet() -> Any:
    torch.manual_seed(1)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip


def autoencoder() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)


def transposed() -> Any:
    """Upsamples by transposed convolutions, which no name tells from others."""
    torch.manual_seed(1)
    return diffusers.UNet1DModel(
        sample_size=16, in_channels=2, out_channels=2, extra_in_channels=0, block_out_channels=(8, 8),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        mid_block_type="UNetMidBlock1D", norm_num_groups=4,
    )  # fmt: skip


@pytest.mark.filterwarnings("error:.*read by their names")
@pytest.mark.parametrize("make", [unet, autoencoder, transposed])
def test_scan_of_the_folder_has_the_rows_of_the_model(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    found = {weight.name: weight for weight in checkpoint_weights(tmp_path)}
    expected = {weight.name: weight for weight in find_weights(model)}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name].layout, found[name].stack_shape) == (weight.layout, weight.stack_shape), name
        assert torch.equal(found[name].matrices(), weight.matrices())
        assert found[name].fingerprint() == weight.fingerprint()
    profile = KappaProfile.from_checkpoint(tmp_path, progress=False)
    profile.check(model)
    name = next(iter(expected))
    values = np.linalg.svd(expected[name].matrices()[0].detach().double().numpy(), compute_uv=False)
    assert profile[name].kappa == pytest.approx(values[0] / values[-1], rel=1e-3)


def test_names_of_older_attention_are_those_of_the_model(tmp_path: Path) -> None:
    config = {**json.loads(autoencoder().to_json_string()), "_class_name": "AutoencoderKL"}
    autoencoder().save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[name] = tensor
    assert any(".query." in name for name in tensors)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {weight.name for weight in checkpoint_weights(tmp_path)} == {w.name for w in find_weights(autoencoder())}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "os"}, r"diffusers [\d.]+ has no model 'os'"),
        ({"_class_name": 3}, "has no model 3"),
        ({"down_block_types": ["Nothing"]}, "makes no model of the config.json beside it"),
        ({"block_out_channels": [4, 4]}, "config.json beside it is another model's"),
    ],
)
def test_config_of_no_such_model_is_said_and_names_and_shapes_tell(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.warns(UserWarning, match=reason):
        assert checkpoint_weights(tmp_path)


def test_without_diffusers_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.warns(UserWarning, match="needs diffusers, which is not installed"):
        assert checkpoint_weights(tmp_path)
