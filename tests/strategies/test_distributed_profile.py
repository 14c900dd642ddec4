"""One profile by many processes: each decomposes a share, all hold every row, and none waits for one that failed."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from ranks import RankFailed, on_ranks
from script import STRATEGIES, Net
from tiny import make_trainer, trainable
from torch import nn

import kappa_lightning.profile.compute
from kappa_lightning import KappaFreezeCallback, KappaProfile
from kappa_lightning.profile.distributed import partition
from kappa_lightning.weights import find_weights


def layers(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(size, size, bias=False) for size in sizes))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_dealing_gives_every_weight_to_one_hand_and_nobody_much_more_than_a_fair_share(world_size: int) -> None:
    weights = find_weights(layers(*torch.randint(2, 40, (30,)).tolist()))
    shares = partition(weights, world_size)
    assert sorted(weight.name for share in shares for weight in share) == sorted(weight.name for weight in weights)
    loads = [sum(weight.cost for weight in share) for share in shares]
    # Graham's bound, against a lower bound of the optimum.
    fair = max(sum(loads) / world_size, max(weight.cost for weight in weights))
    assert max(loads) <= (4 / 3 - 1 / (3 * world_size)) * fair * 1.0001 or max(loads) <= fair


def test_dealing_is_the_same_whatever_the_order_of_the_weights() -> None:
    weights = find_weights(layers(5, 5, 5, 4, 4, 9))
    names = [[weight.name for weight in share] for share in partition(weights, 3)]
    assert [[weight.name for weight in share] for share in partition(weights[::-1], 3)] == names


class Watched:
    """Counts what a process decomposes, and does something at the first of it."""

    def __init__(self, first: Any = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.first = first
        original = kappa_lightning.profile.compute.spectrum

        def spectrum(matrix: torch.Tensor, **options: Any) -> Any:
            if not self.shapes and self.first is not None:
                self.first()
            self.shapes.append(tuple(matrix.shape[-2:]))
            return original(matrix, **options)

        kappa_lightning.profile.compute.spectrum = spectrum


def trainer_for(name: str, root: Path, freeze: KappaFreezeCallback, timeout: float = 60) -> Any:
    devices, make = STRATEGIES[name]
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout)) if name == "ddp" else make()
    return make_trainer(root, freeze, strategy=strategy, devices=devices, use_distributed_sampler=False, max_epochs=1)


def profile_of(name: str, root: Path, **arguments: Any) -> dict[str, Any]:
    watched, freeze = Watched(), KappaFreezeCallback(num_tensors=2, **arguments, exclude=())
    trainer_for(name, root, freeze).fit(Net())
    return {"profile": freeze.profile.to_dict(), "shapes": watched.shapes}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2+tp"])
def test_each_tensor_is_decomposed_by_one_process_and_every_process_has_every_row(tmp_path: Path, name: str) -> None:
    results = on_ranks(profile_of, name, tmp_path, ranks=STRATEGIES[name][0])
    module = Net()
    expected = KappaProfile.from_model(module, progress=False).to_dict()
    assert all(result["profile"] == expected for result in results)
    done = sorted(shape for result in results for shape in result["shapes"])
    assert done == sorted(tuple(dict(module.named_parameters())[weight].shape) for weight in module.MATRICES)
    assert all(result["shapes"] for result in results)


def with_another_last_bit(name: str, root: Path) -> tuple[list[str], dict[str, Any]]:
    """As if the processes ran on different hardware."""
    original = kappa_lightning.profile.compute._row

    def row(weight: Any, spectra: Any, content: str, experts: str) -> Any:
        from dataclasses import replace

        exact = original(weight, spectra, content, experts)
        return replace(exact, kappa=exact.kappa * (1 + 1e-15 * int(os.environ["RANK"])))

    kappa_lightning.profile.compute._row = row
    freeze = KappaFreezeCallback(num_tensors=2, exclude=())
    trainer_for(name, root, freeze).fit(Net())
    return freeze.trained_names, freeze.profile.to_dict()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_all_processes_hold_the_same_figures_although_their_arithmetic_differs(tmp_path: Path, name: str) -> None:
    one, other = on_ranks(with_another_last_bit, name, tmp_path)
    assert one == other


def fit_with_nan(name: str, root: Path, where: str) -> Any:
    module, freeze = Net(), KappaFreezeCallback(num_tensors=2, exclude=())
    dict(module.named_parameters())[where].data[0, 0] = float("nan")
    try:
        trainer_for(name, root, freeze).fit(module)
    except (ValueError, RuntimeError) as error:
        return str(error), trainable(module)


@pytest.mark.parametrize("where", Net.MATRICES)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_nan_in_the_share_of_one_process_stops_all_with_its_name(tmp_path: Path, name: str, where: str) -> None:
    results = on_ranks(fit_with_nan, name, tmp_path, where, timeout=60)
    assert all(f"{where} has entries that are NaN" in message for message, _ in results)
    assert sum("so this one stops, too" in message for message, _ in results) == 1
    assert all(names == list(dict(Net().named_parameters())) for _, names in results)


def fit_and_die(root: Path) -> None:
    if os.environ["RANK"] == "1":
        Watched(first=lambda: os.kill(os.getpid(), signal.SIGKILL))
    else:
        Watched()
    trainer_for("ddp", root, KappaFreezeCallback(num_tensors=2, exclude=()), timeout=5).fit(Net())


def fit_and_stall(root: Path) -> None:
    Watched(first=lambda: time.sleep(60) if os.environ["RANK"] == "1" else None)
    trainer_for("ddp", root, KappaFreezeCallback(num_tensors=2, exclude=()), timeout=3).fit(Net())


def test_process_killed_during_the_profile_makes_the_others_stop(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0: Traceback.*rank 1: ended with exit code -9"):
        on_ranks(fit_and_die, tmp_path, timeout=30)


@pytest.mark.slow
def test_process_that_hangs_during_the_profile_makes_the_others_stop_within_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0: Traceback.*([Tt]imed out|Timeout).*rank 1: no end in time"):
        on_ranks(fit_and_stall, tmp_path, timeout=30)


def with_file(name: str, root: Path, path: Path) -> dict[str, Any]:
    return profile_of(name, root, profile=path)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_profile_file_is_written_once_and_used_by_all(tmp_path: Path, name: str) -> None:
    path = tmp_path / "kappa.json"
    first = on_ranks(with_file, name, tmp_path, path)
    assert [file.name for file in tmp_path.glob("*kappa*")] == ["kappa.json"]
    assert KappaProfile.load(path).to_dict() == first[0]["profile"]
    again = on_ranks(with_file, name, tmp_path, path)
    assert all(result == {"profile": first[0]["profile"], "shapes": []} for result in again)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_file_of_another_model_stops_all_processes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "kappa.json"
    other = Net()
    other.up.weight.data += 1
    KappaProfile.from_model(other, progress=False).save(path)
    with pytest.raises(RankFailed, match=r"(?s)rank 0: .*content of up.weight differs.*rank 1: .*content of up.weight"):
        on_ranks(with_file, name, tmp_path, path, timeout=60)


def test_corrupt_file_stops_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "kappa.json"
    path.write_text('{"format": ')
    with pytest.raises(RankFailed, match=r"(?s)rank 0: .*truncated.*rank 1: .*rank 0 failed.*truncated"):
        on_ranks(with_file, "ddp", tmp_path, path, timeout=60)


def interrupted(root: Path, path: Path) -> None:
    """Both processes have finished one tensor when the power goes."""
    watched = Watched()
    original = kappa_lightning.profile.compute.spectrum

    def spectrum(matrix: torch.Tensor, **options: Any) -> Any:
        if watched.shapes:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(matrix, **options)

    kappa_lightning.profile.compute.spectrum = spectrum
    profile_of("ddp", root, profile=path)


@pytest.mark.parametrize("name", ["ddp", "one"])
def test_interrupted_profile_goes_on_from_what_all_processes_had_finished(tmp_path: Path, name: str) -> None:
    path = tmp_path / "kappa.json"
    on_ranks(interrupted, tmp_path, path, expect=["killed"])
    assert sorted(file.name for file in tmp_path.glob("*kappa*")) == ["kappa.json.partial", "kappa.json.partial.1"]
    results = on_ranks(with_file, name, tmp_path, path, ranks=STRATEGIES[name][0])
    assert sum(len(result["shapes"]) for result in results) == len(Net.MATRICES) - 2
    assert results[0]["profile"] == KappaProfile.from_model(Net(), progress=False).to_dict()
    assert [file.name for file in tmp_path.glob("*kappa*")] == ["kappa.json"]
