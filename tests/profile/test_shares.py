"""A scan that several machines share through a folder."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file

from kappa_lightning import KappaProfile
from kappa_lightning.cli import main
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.profile.shares import profile_share, rank_of_launcher
from kappa_lightning.weights import checkpoint_weights


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({f"layers.{n}.weight": torch.randn(12 + n, 9) for n in range(5)}, file)
    return file


def share(checkpoint, rank, world_size, save_to):
    return profile_share(
        checkpoint_weights(checkpoint),
        ProfileSettings(),
        rank=rank,
        world_size=world_size,
        source=checkpoint,
        save_to=save_to,
    )


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_shares_make_the_profile_that_one_process_makes(checkpoint, tmp_path, world_size):
    out = tmp_path / "profile.json"
    for rank in range(world_size - 1):
        profile, missing = share(checkpoint, rank, world_size, out)
        assert profile is None
        assert missing == list(range(rank + 1, world_size))
    profile, missing = share(checkpoint, world_size - 1, world_size, out)
    assert missing == []
    alone = KappaProfile.from_checkpoint(checkpoint, progress=False)
    assert profile == KappaProfile.load(out)
    assert [row.name for row in profile] == [row.name for row in alone]
    assert [row.kappa for row in profile] == pytest.approx([row.kappa for row in alone], rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "profile.json"]


def test_share_that_is_there_is_not_computed_again(checkpoint, tmp_path, decomposed):
    out = tmp_path / "profile.json"
    share(checkpoint, 0, 2, out)
    done = len(decomposed)
    assert done > 0
    share(checkpoint, 0, 2, out)
    assert len(decomposed) == done


def test_share_of_another_checkpoint_is_not_taken(checkpoint, tmp_path):
    out = tmp_path / "profile.json"
    share(checkpoint, 0, 2, out)
    save_file({f"layers.{n}.weight": torch.ones(12 + n, 9) for n in range(5)}, checkpoint)
    profile, missing = share(checkpoint, 1, 2, out)
    assert profile is None
    assert missing == [0]


def test_all_that_end_at_the_same_time_get_the_profile(checkpoint, tmp_path):
    out = tmp_path / "profile.json"
    found = {}

    def run(rank):
        found[rank] = share(checkpoint, rank, 4, out)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KappaProfile.load(out)) == 5
    assert any(profile is not None for profile, _ in found.values())


def test_launchers_tell_rank_and_world_size():
    assert rank_of_launcher({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)
    assert rank_of_launcher({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}) == (2, 3)
    with pytest.raises(ValueError, match="torchrun or Slurm"):
        rank_of_launcher({})


def test_scan_in_shares_writes_one_profile(checkpoint, tmp_path, capsys):
    out = tmp_path / "profile.json"
    arguments = ["scan", str(checkpoint), "--out", str(out), "--world-size", "2", "--rank"]
    assert main([*arguments, "0"]) == 0
    assert "rank 1" in capsys.readouterr().out
    assert not out.exists()
    assert main([*arguments, "1"]) == 0
    assert "of 5 tensors" in capsys.readouterr().out
    assert len(KappaProfile.load(out)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "2", "--world-size", "2", "--out", "p.json"], "rank=2"),
        (["--rank", "0", "--out", "p.json"], "--world-size"),
        (["--rank", "0", "--world-size", "2"], "--out"),
    ],
)
def test_share_that_cannot_be_is_refused(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["scan", str(checkpoint), *arguments]) == 1
    assert message in capsys.readouterr().err
