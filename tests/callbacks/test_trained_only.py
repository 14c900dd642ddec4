"""Files of only what trains: their size, their base, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyNet, assert_same_tensors, fit, scripted_probe, snapshot

from kappa_lightning import ForgettingEval, KappaFreezeCallback, TrainedOnlyCheckpoint, load_trained
from kappa_lightning.callbacks import save_full


def _trained(tmp_path: Path, **options: object) -> tuple[TinyNet, TrainedOnlyCheckpoint, KappaFreezeCallback]:
    module, freeze = TinyNet(), KappaFreezeCallback(num_tensors=1)
    keep = TrainedOnlyCheckpoint(tmp_path / "kept", **options)  # type: ignore[arg-type]
    fit(tmp_path, module, freeze, keep, max_epochs=2)
    return module, keep, freeze


def test_only_what_trained_is_kept_and_comes_back(tmp_path: Path) -> None:
    module, keep, freeze = _trained(tmp_path)
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == [
        "epoch=0-step=3.safetensors",
        "epoch=1-step=6.safetensors",
    ]
    kept = load_file(keep.last_path)
    changed = {
        name for name, value in TinyNet().state_dict().items() if not torch.equal(value, module.state_dict()[name])
    }
    assert set(kept) == changed
    assert set(freeze.frozen_names).isdisjoint(kept)
    fresh = TinyNet()
    assert set(load_trained(fresh, keep.last_path)) == changed
    assert_same_tensors(snapshot(fresh), snapshot(module))


def test_another_base_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    _, keep, _ = _trained(tmp_path)
    other = TinyNet()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"belongs to another base: its head\.weight"):
        load_trained(other, keep.last_path)
    assert_same_tensors(before, snapshot(other))
    with pytest.raises(ValueError, match="the module has no tensor"):
        load_trained(torch.nn.Linear(2, 2), keep.last_path)


def test_full_checkpoint_loads_without_us(tmp_path: Path) -> None:
    module, keep, _ = _trained(tmp_path)
    for name in ("whole.ckpt", "whole.safetensors"):
        save_full(TinyNet(), keep.last_path, tmp_path / name)
    plain = TinyNet()
    plain.load_state_dict(torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"])
    assert_same_tensors(snapshot(plain), snapshot(module))
    plain.load_state_dict(load_file(tmp_path / "whole.safetensors"))
    assert_same_tensors(snapshot(plain), snapshot(module))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    _, keep, _ = _trained(tmp_path)
    content = bytearray(keep.last_path.read_bytes())
    content[-2] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    for name, why in (("flipped", "is damaged"), ("cut", "truncated")):
        with pytest.raises(ValueError, match=why):
            load_trained(TinyNet(), tmp_path / f"{name}.safetensors")


def test_best_by_retention_is_the_one_that_is_kept(tmp_path: Path) -> None:
    keep = TrainedOnlyCheckpoint(tmp_path / "kept", monitor="forgetting/retention")
    fit(tmp_path, TinyNet(), ForgettingEval({"a": scripted_probe([1.0, 0.5, 0.8, 0.6])}), keep, max_epochs=3)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=1-step=6.safetensors"]
    assert keep.best_score == pytest.approx(0.8)


def test_base_survives_a_resume(tmp_path: Path) -> None:
    trainer = fit(tmp_path, TinyNet(), TrainedOnlyCheckpoint(tmp_path / "kept"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module, keep = TinyNet(), TrainedOnlyCheckpoint(tmp_path / "kept")
    fit(tmp_path, module, keep, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    fresh = TinyNet()
    load_trained(fresh, keep.last_path)
    assert_same_tensors(snapshot(fresh), snapshot(module))
