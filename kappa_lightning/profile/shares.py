"""One profile of a checkpoint by several machines that have a folder in common and nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kappa_lightning.profile.distributed import Watch, partition
from kappa_lightning.profile.profile import KappaProfile
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.weights import Weight

# Who started this process, and what it calls rank and world size: torchrun, and Slurm's arrays and tasks.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", 0),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", 0),
)


def rank_of_launcher(environment: Mapping[str, str]) -> tuple[int, int]:
    """The rank and the world size that torchrun, a Slurm array or ``srun`` has given this process.

    Raises:
        ValueError: if none of them has.

    Example:
        >>> rank_of_launcher({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"})
        (2, 8)
    """
    for rank, world_size, first in _LAUNCHERS:
        if rank in environment and world_size in environment:
            start = int(environment.get(first, 0)) if isinstance(first, str) else first
            return int(environment[rank]) - start, int(environment[world_size])
    raise ValueError("this process was not started by torchrun or Slurm: give rank and world size yourself")


def profile_share(
    weights: Sequence[Weight],
    settings: ProfileSettings,
    *,
    rank: int,
    world_size: int,
    source: str | os.PathLike[str],
    save_to: str | os.PathLike[str],
    device: torch.device | str | None = None,
    watch: Watch | None = None,
) -> tuple[KappaProfile | None, list[int]]:
    """Decompose one process' share of the weights; whoever is last puts all shares together.

    The processes exchange nothing but files beside ``save_to``, one for each share, and need not run at the same
    time. A share that was interrupted goes on from its journal; one that is there is not computed again. The files'
    names have a digest of the checkpoint in them, so that shares of another one are never taken for these.

    Args:
        weights: all of them, the same for every process.
        settings: how they are decomposed.
        rank: which share this process does, from 0.
        world_size: how many shares there are.
        source: the checkpoint's file or folder.
        save_to: where the profile goes, in a folder that all of them have.
        device: where to compute.
        watch: sees the weights and their rows as they come, to show progress.

    Returns:
        The whole profile, which is then saved, if all shares are there, else ``None``; and the ranks that are missing.

    Raises:
        ValueError: if ``rank`` or ``world_size`` is out of range; and as
            :meth:`~kappa_lightning.KappaProfile.from_weights`.
        FileNotFoundError: if the folder of ``save_to`` does not exist.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be from 0 to world_size - 1, and world_size={world_size} at least 1")
    digest = _digest(weights, settings, Path(source))
    files = [Path(f"{os.fspath(save_to)}.share-{each}-of-{world_size}-{digest}") for each in range(world_size)]
    shares = partition(weights, world_size)
    if not files[rank].exists():
        KappaProfile.from_weights(shares[rank], settings, device=device, save_to=files[rank], watch=watch)
    missing = [each for each, file in enumerate(files) if not file.exists()]
    if missing:
        return None, missing
    try:
        parts = [KappaProfile.load(file) for file in files]
    except FileNotFoundError:
        # Another process has found all of them at the same time, and has put them together first.
        return KappaProfile.load(save_to), []
    rows = {row.name: row for part in parts for row in part}
    profile = KappaProfile((rows[weight.name] for weight in weights), settings)
    profile.save(save_to)
    for file in files:
        file.unlink(missing_ok=True)
    return profile, []


def _digest(weights: Sequence[Weight], settings: ProfileSettings, source: Path) -> str:
    files = [source] if source.is_file() else sorted(file for file in source.glob("*") if file.is_file())
    known = [
        sorted(settings.of_rows.items()),
        [(weight.name, weight.shape, str(weight.dtype)) for weight in weights],
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    ]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:12]
