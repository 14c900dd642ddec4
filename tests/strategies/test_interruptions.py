"""An exception, Ctrl+C or SIGTERM in the middle of a profile or an evaluation leaves nothing half-done."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import Bank, Down, bank_loader, group_ids, make_trainer, numpy_ranking, snapshot, trainable

import kappa_lightning.profile.compute
from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, KappaProfile, Probe

MATRICES = ("a.weight", "b.weight", "c.weight", "d.weight")
EVERYTHING = [name for matrix in MATRICES for name in (matrix, matrix.replace("weight", "bias"))]


def make_net() -> Bank:
    """Four layers, of which each of two processes decomposes two."""
    torch.manual_seed(0)
    return Bank(a=(5, 3.0), b=(6, 2.0), c=(5, 9.0), d=(6, 5.0))


class Switch:
    """Does to this process what a test wants at the n-th call, if it is one of the ranks that are hit."""

    def __init__(self, how: str, call: int, ranks: tuple[int, ...]) -> None:
        self.how = how
        self.left = call if int(os.environ["RANK"]) in ranks else -1

    def __call__(self) -> None:
        self.left -= 1
        if self.left != 0:
            return
        if self.how == "exception":
            raise RuntimeError("power cut")
        if self.how == "Ctrl+C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)


def interrupt(where: str, how: str, ranks: tuple[int, ...], call: int, processes: int, root: Path) -> dict[str, Any]:
    """A fit that is interrupted, what is left of it, and a fit after it in the same processes."""
    switch = Switch(how, call, ranks)
    original = kappa_lightning.profile.compute.spectrum

    decomposed = 0

    def spectrum(matrix: Any, **options: Any) -> Any:
        nonlocal decomposed
        decomposed += 1
        if where == "profile":
            switch()
        return original(matrix, **options)

    def step(module: Any, batch: Any) -> Any:
        if where == "probe":
            switch()
        return module.loss(batch)

    kappa_lightning.profile.compute.spectrum = spectrum
    module, told = make_net(), {}
    module.d.bias.requires_grad_(False)
    before = snapshot(module)
    freeze, monitor = KappaFreezeCallback(num_tensors=2, profile=root / "profile.json"), KappaMonitor()
    forgetting = ForgettingEval({"old": Probe(bank_loader(), Down(), step)})

    def fit() -> Any:
        options = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
        trainer = make_trainer(root, freeze, monitor, forgetting, **options)
        trainer.fit(module, bank_loader())
        return trainer

    try:
        fit()
        return {"selected": freeze.selected_names, "decomposed": decomposed}
    except BaseException as error:  # noqa: BLE001 - Ctrl+C ends in SystemExit
        told["error"] = f"{type(error).__name__}: {error}"
    told["left"] = {
        "trains": trainable(module),
        "groups": group_ids(module.made) == module.made_groups,
        "weights": all(torch.equal(tensor, before[name]) for name, tensor in snapshot(module).items()),
        "modes": all(submodule.training for submodule in module.modules()),
        "files": sorted(path.name for path in root.rglob("*") if path.is_file()),
    }
    told["steps"] = len(module.losses)
    if module.losses:
        return told
    fit()
    told["again"] = {
        "selected": freeze.selected_names,
        "trains": sorted(trainable(module)),
        "steps": [record["step"] for record in forgetting.history],
        "kappa": [record["step"] for record in monitor.history],
        "files": sorted(path.name for path in root.rglob("*") if path.is_file()),
    }
    return told


CASES = [
    (where, how, ranks, processes)
    for where in ("profile", "probe")
    for how, ranks, processes in (
        ("exception", (0,), 1),
        ("exception", (0,), 2),
        ("exception", (1,), 2),
        ("exception", (0, 1), 2),
        ("Ctrl+C", (0,), 1),
        ("Ctrl+C", (0, 1), 2),
    )
]


@pytest.mark.parametrize(("where", "how", "ranks", "processes"), CASES)
def test_next_fit_in_the_same_processes_is_as_the_first_would_have_been(
    tmp_path: Path, where: str, how: str, ranks: tuple[int, ...], processes: int
) -> None:
    call = 2 if where == "profile" or processes == 1 else 1
    results = on_ranks(interrupt, where, how, ranks, call, processes, tmp_path, ranks=processes)
    lowest = numpy_ranking(make_net(), MATRICES)[:2]
    for rank, told in enumerate(results):
        if how == "Ctrl+C":
            assert told["error"] == "SystemExit: 1"
        elif rank in ranks:
            assert told["error"] == "RuntimeError: power cut"
        else:
            assert told["error"].startswith(f"RuntimeError: the process of rank {ranks[0]} failed, so this one stops")
        assert told["left"]["trains"] == [name for name in EVERYTHING if name != "d.bias"]
        assert told["left"]["groups"]
        assert told["left"]["weights"]
        assert told["left"]["modes"]
        journals = {"profile.json.partial"} | ({"profile.json.partial.1"} if processes == 2 else set())
        assert set(told["left"]["files"]) <= (journals if where == "profile" else {"profile.json"})
        assert told["again"]["selected"] == lowest
        assert told["again"]["trains"] == sorted(lowest)
        assert told["again"]["steps"] == told["again"]["kappa"] == [0, 3 if processes == 1 else 2]
        assert told["again"]["files"] == ["profile.json"]
    assert KappaProfile.load(tmp_path / "profile.json") == KappaProfile.from_model(make_net(), progress=False)


@pytest.mark.parametrize(("ranks", "processes"), [((0,), 1), ((0, 1), 2), ((1,), 2)])
def test_sigterm_in_the_profile_leaves_only_the_journal_from_which_the_next_run_goes_on(
    tmp_path: Path, ranks: tuple[int, ...], processes: int
) -> None:
    def start(how: str, hit: tuple[int, ...]) -> list[Any]:
        return on_ranks(interrupt, "profile", how, hit, 2, processes, tmp_path, ranks=processes, expect=ends)

    ends = ["killed", "error"]
    outcomes = start("SIGTERM", ranks)
    assert all(f"exit code {-signal.SIGTERM}" in outcomes[rank] for rank in ranks)
    journals = [tmp_path / name for name in ("profile.json.partial", "profile.json.partial.1")[:processes]]
    assert sorted(tmp_path.iterdir()) == journals
    known = [json.loads(line)["row"]["name"] for path in journals for line in path.read_text().splitlines()[1:]]
    assert len(known) == (2 if ranks == (1,) else 1) + (processes - 1)
    ends = []
    after = start("nothing", ())
    # KappaMonitor takes the figures at the start from the profile, and decomposes the two that train after the epoch.
    assert sum(told["decomposed"] for told in after) == len(MATRICES) - len(known) + 2
    assert all(told["selected"] == numpy_ranking(make_net(), MATRICES)[:2] for told in after)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert KappaProfile.load(tmp_path / "profile.json") == KappaProfile.from_model(make_net(), progress=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_in_a_probe_ends_the_run_after_the_batch_and_unfreezes(tmp_path: Path, processes: int) -> None:
    every = tuple(range(processes))
    for told in on_ranks(interrupt, "probe", "SIGTERM", every, 1, processes, tmp_path, ranks=processes):
        assert told["error"].startswith("SIGTERMException")
        assert told["steps"] <= 1
        assert told["left"]["trains"] == [name for name in EVERYTHING if name != "d.bias"]
        assert told["left"]["modes"]
        assert told["left"]["files"] == ["profile.json"]
