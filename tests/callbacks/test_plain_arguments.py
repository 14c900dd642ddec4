"""What scripts pass, NumPy's numbers and other sequences, is taken and stored as plain Python; ``repr`` shows it."""

from __future__ import annotations

from collections import UserList
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyNet, fit

from kappa_lightning import KappaFreezeCallback

ARGUMENTS: list[dict[str, Any]] = [
    {"top_p": np.float64(0.5), "seed": np.int64(3), "criterion": np.str_("random"), "rtol": np.float32(0.01)},
    {"num_tensors": np.int64(2), "include": UserList(["h*", "conv.*"]), "train_vectors": np.bool_(True)},
    {"max_params": np.float32(0.5), "exclude": np.array(["embed.*"]), "within": np.str_("shape")},
    {"max_params": np.int32(60), "always_train": np.array(["norm.*"]), "experts": np.str_("max")},
    {"max_kappa": np.float16(100.0), "include": (np.str_("h*"),), "solver": np.str_("svd")},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: next(iter(arguments)))
def test_numpys_values_train_and_their_checkpoint_loads_with_weights_only(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    callback = KappaFreezeCallback(**arguments)
    fit(tmp_path, TinyNet(), callback).save_checkpoint(tmp_path / "one.ckpt")
    torch.load(tmp_path / "one.ckpt", weights_only=True)
    again = KappaFreezeCallback(**arguments)
    fit(tmp_path, TinyNet(), again, ckpt_path=tmp_path / "one.ckpt", max_epochs=2, limit_train_batches=1)
    assert again.trained_names == callback.trained_names
    stored = [*vars(callback.budget).values(), callback.seed, callback.criterion, callback.within, callback.rtol]
    stored += [callback.solver, callback.experts, callback.train_vectors, *callback.include, *callback.exclude]
    assert {type(value) for value in stored} <= {int, float, str, bool, type(None)}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"top_p": np.bool_(True)}, "top_p=.*True.* is not a number"),
        ({"num_tensors": np.float64(2)}, "num_tensors=2.0 must be an int"),
        ({"seed": np.float64(1)}, "seed=.*1.0.* is not an int"),
        ({"include": np.str_("head.*")}, r"include=.*head.* is one string: .*\['head\.\*'\]"),
        ({"exclude": [3]}, "exclude holds 3"),
        ({"always_train": {"head": 1}}, "always_train=.* is a dict"),
        ({"train_vectors": "False"}, "train_vectors='False' is a str: give True or False"),
    ],
)
def test_what_is_no_number_and_no_sequence_of_globs_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        KappaFreezeCallback(**arguments)


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (KappaFreezeCallback(), "KappaFreezeCallback(top_p=0.2)"),
        (
            KappaFreezeCallback(num_tensors=3, include=["text.*"], solver="svd", seed=1),
            "KappaFreezeCallback(num_tensors=3, include=['text.*'], solver='svd', seed=1)",
        ),
        (
            KappaFreezeCallback(max_params=0.5, exclude=(), profile="kappa.json"),
            "KappaFreezeCallback(max_params=0.5, exclude=[], profile=PosixPath('kappa.json'))",
        ),
    ],
)
def test_repr_is_the_call_without_defaults(callback: KappaFreezeCallback, text: str) -> None:
    assert repr(callback) == text


def test_omegaconfs_lists_are_taken(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    callback = KappaFreezeCallback(num_tensors=1, include=omegaconf.OmegaConf.create(["h*"]))
    fit(tmp_path, TinyNet(), callback).save_checkpoint(tmp_path / "one.ckpt")
    torch.load(tmp_path / "one.ckpt", weights_only=True)
