"""Experts in MXFP4: dequantized where a checkpoint is read, refused with a way out where a model has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from mixtures import build
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors

from kappa_lightning import KappaProfile
from kappa_lightning.weights import checkpoint_weights, find_weights

SIZES = {"hidden_size": 64, "intermediate_size": 32}


def pack(name: str, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    """Codes and scales that stand for a tensor of that shape (experts, inputs, outputs)."""
    numbers = torch.Generator().manual_seed(seed)
    experts, inputs, outputs = shape
    blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=numbers)
    scales = torch.randint(118, 122, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=numbers)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A tiny gpt-oss as its makers publish it: experts in MXFP4, in two shards that part blocks from scales."""
    build("GptOss", 3, **SIZES).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for seed, name in enumerate([name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]):
        tensors |= pack(name, tuple(tensors.pop(name).shape), seed)
    shards = {"1": {}, "2": {}}
    for name, tensor in tensors.items():
        shards["2" if name.endswith("_scales") else "1"][name] = tensor
    for shard, held in shards.items():
        save_file(held, tmp_path / f"{shard}.safetensors")
    places = {name: f"{shard}.safetensors" for shard, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("configured", [True, False])
def test_a_checkpoint_is_read_as_transformers_dequantizes_it(packed: Path, configured: bool) -> None:
    if not configured:
        (packed / "config.json").unlink()
        with pytest.warns(UserWarning, match="as stacks of matrices"):
            weights = {weight.name: weight for weight in checkpoint_weights(packed)}
    else:
        weights = {weight.name: weight for weight in checkpoint_weights(packed)}
    stored = load_file(packed / "1.safetensors") | load_file(packed / "2.safetensors")
    for attribute, shape in (("gate_up_proj", (3, 64, 64)), ("down_proj", (3, 32, 64))):
        name = f"model.layers.0.mlp.experts.{attribute}"
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert weights[name].shape == tuple(expected.shape) == shape
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name].read(), expected)
    assert not [name for name in weights if name.endswith(("_blocks", "_scales"))]


def test_each_expert_has_its_kappa_and_the_loaded_model_is_the_one_that_was_scanned(packed: Path) -> None:
    arguments = {"include": ["@experts"], "experts": "each", "progress": False}
    profile = KappaProfile.from_checkpoint(packed, **arguments)
    assert len(profile) == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    profile.check(model)
    for row in profile:
        tensor, _, expert = row.name.rstrip("]").partition("[")
        matrix = model.get_parameter(tensor)[int(expert)].detach().double().numpy()
        values = np.linalg.svd(matrix, compute_uv=False)
        assert row.kappa == pytest.approx(values[0] / values[-1], rel=1e-3)


def test_a_model_in_mxfp4_is_refused_with_what_to_do() -> None:
    config = transformers.GptOssConfig(num_local_experts=2, hidden_size=64, intermediate_size=32)
    layer = Mxfp4GptOssExperts(config)
    weight = next(weight for weight in find_weights(layer) if weight.name == "gate_up_proj")
    with pytest.raises(TypeError, match=r"gate_up_proj is stored in MXFP4 .*Mxfp4Config\(dequantize=True\)"):
        weight.matrices()
