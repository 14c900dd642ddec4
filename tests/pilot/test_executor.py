import math

import pytest
import torch

from kappa_lightning.pilot import executor
from kappa_lightning.pilot.adaptation import Point
from kappa_lightning.pilot.executor import Executor
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.trial import Run, Setup, Spec


def executing(tmp_path, monkeypatch, trial, workers=1, **trainer):
    monkeypatch.setattr(executor, "run_trial", trial)
    monkeypatch.setattr(executor, "_require_picklable", lambda *_: None)
    setup = Setup(None, None, {}, "val/loss", 4, trainer=trainer)
    candidates = dict.fromkeys(("a", "b", "c"))
    return Executor(setup, candidates, Journal(tmp_path, {}), workers=workers)


def test_time_of_runs_side_by_side_is_that_of_the_last_one(tmp_path, monkeypatch):
    seconds = {"a": 5.0, "b": 2.0, "c": 2.0}

    def trial(setup, spec, by):
        return Run(spec, (), (), {}, 1, 1, seconds[spec.candidate])

    one = executing(tmp_path / "one", monkeypatch, trial)
    specs = [Spec(name, 0, 0) for name in seconds]
    one(specs)
    assert one.spent == 9
    two = executing(tmp_path / "two", monkeypatch, trial, workers=2)
    # A single run has a process to itself, and the other one waits.
    two(specs[:1])
    assert two.spent == 5
    for run in (Run(spec, (), (), {}, 1, 1, seconds[spec.candidate]) for spec in specs[1:]):
        two.journal.add(run)
    two(specs)
    assert two.spent == 7


def test_error_of_one_candidate_leaves_the_runs_of_the_others(tmp_path, monkeypatch):
    asked = []

    def trial(setup, spec, by):
        asked.append(spec.candidate)
        if spec.candidate == "b":
            raise RuntimeError("out of memory")
        return Run(spec, (), (), {}, 1, 1, 1.0)

    execute = executing(tmp_path, monkeypatch, trial)
    runs, failed = execute.attempt([Spec(name, 0, 0) for name in "abc"])
    assert [run.spec.candidate for run in runs] == ["a", "c"]
    assert asked == ["a", "b", "c"]
    assert {name: str(error) for name, error in failed.items()} == {"b": "out of memory"}
    assert [run.spec.candidate for run in execute.journal.runs()] == ["a", "c"]


def test_error_at_another_rate_or_seed_is_said_and_counts_as_diverged(tmp_path, monkeypatch):
    def trial(setup, spec, by):
        if spec.step or spec.candidate == "b":
            raise ValueError("found invalid values: nan")
        return Run(spec, (Point(0.0, 3.0, {"old": 1.0}), Point(4.0, 2.0, {"old": 0.9})), (), {"old": 0.8}, 1, 1, 1.0)

    execute = executing(tmp_path, monkeypatch, trial)
    execute([Spec("a", 0, 0)])
    with pytest.warns(UserWarning, match="'a' at its rate × 2 and seed 0 raised ValueError: found invalid values"):
        runs, failed = execute.attempt([Spec("a", 2, 0)])
    assert not failed
    assert runs[0].path == (Point(0.0, 3.0, {"old": 1.0}), Point(4.0, math.inf, {"old": 0.0}))
    assert list(execute.raised) == [Spec("a", 2, 0)]
    assert execute.spent == 2.0  # as if it had taken as long as the run before
    assert [run.spec for run in execute.journal.runs()] == [Spec("a", 0, 0)]  # it is tried again when resumed
    with pytest.raises(ValueError, match="invalid values"):
        execute([Spec("b", 0, 0), Spec("c", 0, 0)])
    assert Spec("c", 0, 0) in execute.made


def test_processes_share_the_cuda_devices_unless_the_trainer_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    shared = executing(tmp_path / "one", monkeypatch, None, workers=3)._devices()
    assert [shared.get(timeout=10) for _ in range(3)] == ["4", "6", "4"]
    assert executing(tmp_path / "two", monkeypatch, None, workers=3, devices=[1])._devices() is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert executing(tmp_path / "three", monkeypatch, None, workers=3)._devices() is None
