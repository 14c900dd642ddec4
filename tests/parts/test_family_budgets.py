"""A budget of a tenth of the experts trains exactly those, in each family and each layout of its experts."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers
from mixtures import FAMILIES, HYBRIDS, build
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kappa_lightning import KappaFreezeCallback, KappaProfile

EXPERTS = 7
SMALL = {"hidden_size": 16, "intermediate_size": 12, "vocab_size": 32}


class Learner(pl.LightningModule):
    """Learns random tokens, with everything in the optimizer that could move what is frozen."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


class AsStored(Learner):
    """The tensors of a checkpoint under their names: of most families each expert by itself."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(nn.Module())
        for name, tensor in tensors.items():
            *path, attribute = name.split(".")
            layer = self.net
            for step, at in enumerate(path):
                if at not in layer._modules:
                    is_linear = step == len(path) - 1 and attribute == "weight" and tensor.ndim == 2
                    layer.add_module(at, nn.Linear(*tensor.shape[::-1], bias=False) if is_linear else nn.Module())
                layer = layer.get_submodule(at)
            layer.register_parameter(attribute, nn.Parameter(tensor.clone()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()


def fit(module: Learner, freeze: KappaFreezeCallback) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        gradient_clip_val=0.5,
        callbacks=[freeze],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.arange(32).reshape(4, 8), 2))


def experts_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix of an expert by the name of its candidate."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        # Granite's files have the experts of a layer in the layer itself, and its hybrids the shared one beside it;
        # what gates a shared expert is a router.
        is_expert = any(part in name for part in ("expert", "moe.input", "moe.output", "shared_mlp"))
        if is_expert and "expert_gate" not in name:
            if tensor.ndim == 3:
                found |= {f"{name}[{expert}]": matrix for expert, matrix in enumerate(tensor)}
            elif tensor.ndim == 2 and not name.endswith("_bias"):
                found[name] = tensor
    return found


def lowest_tenth(state: dict[str, Tensor]) -> set[str]:
    kappas = {}
    for name, matrix in experts_of(state).items():
        values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        kappas[name] = values[0] / values[-1]
    assert len(kappas) >= 2 * EXPERTS
    return set(sorted(kappas, key=lambda name: (kappas[name], name))[: max(1, int(0.1 * len(kappas)))])


def assert_these_alone_moved(before: dict[str, Tensor], after: dict[str, Tensor], chosen: set[str]) -> None:
    assert list(before) == list(after)
    matrices, now = experts_of(before), experts_of(after)
    assert {name for name in matrices if not torch.equal(matrices[name], now[name])} == chosen
    others = before.keys() - {name.partition("[")[0] for name in matrices}
    assert all(torch.equal(before[name], after[name]) for name in others)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tenth_of_the_experts_trains_and_nothing_else(family: str) -> None:
    module = Learner(build(family, EXPERTS, **SMALL))
    before = state_of(module)
    freeze = KappaFreezeCallback(top_p=0.1, include=["@experts"], experts="each")
    fit(module, freeze)
    assert set(freeze.selected_names) == lowest_tenth(before)
    assert_these_alone_moved(before, state_of(module), lowest_tenth(before))


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrid_models_train_a_tenth_of_their_experts_and_rank_no_decay_rate(family: str) -> None:
    module = Learner(build(family, EXPERTS, **SMALL))
    before = state_of(module)
    freeze = KappaFreezeCallback(top_p=0.1, include=["@experts"], experts="each")
    fit(module, freeze)
    assert set(freeze.selected_names) == lowest_tenth(before)
    assert_these_alone_moved(before, state_of(module), lowest_tenth(before))
    ranked = {row.name.rpartition(".")[2] for row in KappaProfile.from_model(module, experts="each", progress=False)}
    vectors = {"A_log", "D", "dt_bias"}
    assert vectors & {name.rpartition(".")[2] for name in before}
    assert not ranked & vectors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_of_the_saved_model_chooses_for_the_one_that_is_loaded(family: str, tmp_path: Path) -> None:
    build(family, EXPERTS, **SMALL).save_pretrained(tmp_path / "model")
    scanned = KappaProfile.from_checkpoint(tmp_path / "model", include=["@experts"], experts="each", progress=False)
    scanned.save(tmp_path / "kappa.json")
    module = Learner(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    before = state_of(module)
    freeze = KappaFreezeCallback(top_p=0.1, include=["@experts"], experts="each", profile=str(tmp_path / "kappa.json"))
    fit(module, freeze)
    assert_these_alone_moved(before, state_of(module), lowest_tenth(before))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tenth_of_the_experts_as_the_file_has_them(family: str, tmp_path: Path) -> None:
    build(family, EXPERTS, **SMALL).save_pretrained(tmp_path)
    module = AsStored(load_file(tmp_path / "model.safetensors"))
    before = state_of(module)
    freeze = KappaFreezeCallback(top_p=0.1, include=["@experts"], experts="each")
    fit(module, freeze)
    assert set(freeze.selected_names) == lowest_tenth(before)
    assert_these_alone_moved(before, state_of(module), lowest_tenth(before))
