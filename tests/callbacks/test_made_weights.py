"""Weights that are made from several parameters train, freeze and resume with all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Bank, fit, snapshot, trainable
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from kappa_lightning import KappaFreezeCallback


class Product(nn.Module):
    """A weight as the product of a wider matrix than it is and another one."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = weight.shape
        return torch.cat((weight, weight.new_zeros(rows, 1)), 1), torch.eye(cols + 1, cols)


def _normalized_by_hook(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)


MADE: dict[str, tuple[Callable[[nn.Module], Any], set[str]]] = {
    "weight_norm": (parametrizations.weight_norm, {f"parametrizations.weight.original{i}" for i in (0, 1)}),
    "weight_norm by hook": (_normalized_by_hook, {"weight_g", "weight_v"}),
    "product": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Product()),
        {f"parametrizations.weight.original{i}" for i in (0, 1)},
    ),
}


def _made_bank(kind: str, layer: str) -> tuple[Bank, set[str]]:
    torch.manual_seed(3)
    module = Bank(a=(4, 2.0), b=(4, 9.0))
    make, originals = MADE[kind]
    make(getattr(module, layer))
    return module, {f"{layer}.{name}" for name in originals}


@pytest.mark.parametrize("kind", MADE)
def test_selected_weight_trains_with_everything_it_is_made_from(tmp_path: Path, kind: str) -> None:
    module, originals = _made_bank(kind, "a")
    before = snapshot(module)
    callback = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, module, callback)
    assert set(trainable(module)) == set(callback.trained_names) == originals
    after = snapshot(module)
    assert originals <= {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("train_vectors", [False, True])
def test_weight_that_is_not_selected_is_frozen_with_everything_it_is_made_from(
    tmp_path: Path, kind: str, train_vectors: bool
) -> None:
    module, originals = _made_bank(kind, "b")
    before = snapshot(module)
    callback = KappaFreezeCallback(num_tensors=1, train_vectors=train_vectors)
    fit(tmp_path, module, callback)
    assert set(trainable(module)) == {"a.weight", *(["a.bias", "b.bias"] if train_vectors else [])}
    assert originals <= set(callback.frozen_names)
    after = snapshot(module)
    assert all(torch.equal(before[name], after[name]) for name in originals)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("layer", ["a", "b"])
def test_resume_of_a_weight_that_is_made_from_parameters_of_other_shapes(tmp_path: Path, kind: str, layer: str) -> None:
    whole, _ = _made_bank(kind, layer)
    fit(tmp_path, whole, KappaFreezeCallback(num_tensors=1), max_epochs=2)
    first, _ = _made_bank(kind, layer)
    fit(tmp_path, first, KappaFreezeCallback(num_tensors=1)).save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = _made_bank(kind, layer)
    fit(tmp_path, resumed, KappaFreezeCallback(num_tensors=1), ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert trainable(resumed) == trainable(whole)
    assert first.losses + resumed.losses == whole.losses
