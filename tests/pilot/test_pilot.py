import inspect
import json
import multiprocessing
import os
import tomllib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from outside import ImageData, Images, Manual, Plain, image_probe, number_loaders, number_probe

import kappa_lightning
import kappa_lightning.pilot.executor as executor
from kappa_lightning.pilot import Candidate, PilotResult, RateFactor, TrainOnly, candidate, pilot
from kappa_lightning.pilot.configured import Configured
from kappa_lightning.pilot.entry import Entry
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.statistics import Interval
from kappa_lightning.pilot.trial import Run, Setup, Spec, run_trial

SMALL = {
    "steps": 8, "evaluations": 1, "race_seeds": 0, "confirm_seeds": 2, "finalists": 2, "progress": False,
    "level": 1.05, "trainer": {"accelerator": "cpu"},
}  # fmt: skip


def mine(module):
    return [TrainOnly(["head.weight"])]


def ask(module, folder=None, candidates=("full", mine), probes=number_probe, **options):
    return pilot(lambda: module, number_loaders, probes, list(candidates), folder=folder, **{**SMALL, **options})


@pytest.mark.slow
def test_interrupted_pilot_goes_on_repeats_nothing_and_finds_the_same(tmp_path, monkeypatch):
    done = []

    def counting(limit):
        def run(setup, spec, by):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(spec)
            # Time is the only thing of a run that is not the same again.
            return replace(run_trial(setup, spec, by), seconds=1.0)

        return run

    module = Plain()
    monkeypatch.setattr(executor, "run_trial", counting(3))
    with pytest.raises(KeyboardInterrupt):
        ask(module, tmp_path / "one")
    monkeypatch.setattr(executor, "run_trial", counting(1000))
    result = ask(module, tmp_path / "one")
    assert len(done) == len(set(done)) == result.runs
    again = ask(module, tmp_path / "one")
    assert len(done) == result.runs
    assert again == result
    assert {entry.name for entry in result.entries} == {"full", "mine"}
    assert result.chosen
    check_files(result, tmp_path, module)


def check_files(result, folder, module):
    for name in ("pilot.toml", "pilot.json"):
        result.save(folder / name)
        loaded = PilotResult.load(folder / name)
        assert loaded.table == result.table
        assert loaded.front == result.front
        assert [e.label for e in loaded.chosen] == [e.label for e in result.chosen]
    assert tomllib.loads((folder / "pilot.toml").read_text())["level"] == result.level
    with pytest.raises(ValueError, match=r"must end in \.toml or \.json"):
        result.save(folder / "pilot.yaml")
    (folder / "other.json").write_text(json.dumps({"level": 1}))
    with pytest.raises(ValueError, match="is no result of a pilot"):
        PilotResult.load(folder / "other.json")
    page = result.report(folder / "page")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert all(entry.label in text for entry in result.entries)
    assert sorted(p.name for p in page.parent.iterdir()) == ["callbacks.yaml", "index.html", "pilot.png", "report.md"]
    first = next(entry for entry in result.entries if entry.init is not None)
    best = replace(result, entries=(replace(first, in_set=True, near=True),)).best
    made = best.callbacks()
    assert isinstance(made[0], RateFactor)
    configured = yaml.safe_load(best.yaml())["trainer"]["callbacks"]
    assert [entry["class_path"].rpartition(".")[2] for entry in configured] == [type(c).__name__ for c in made]
    trainer = pl.Trainer(
        max_steps=2, callbacks=made, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, *number_loaders())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    def found(workers):
        result = pilot(
            Plain, number_loaders, number_probe, ["full", "last_layers 0.9"], workers=workers,
            folder=tmp_path / str(workers), **SMALL,
        )  # fmt: skip
        return [(e.label, e.retention, e.nats, e.factor, e.in_set) for e in result.entries], result.runs

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of two processes has
    try:
        assert found(2) == found(1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Manual, Images])
def test_modules_from_outside_go_through(kind):
    module = kind()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    images = kind is Images
    result = pilot(
        lambda: module, ImageData if images else number_loaders, image_probe if images else number_probe,
        ["last_layers 0.9"], **{**SMALL, "level": 1.3 if images else 1.05, "confirm_seeds": 1},
    )  # fmt: skip
    assert result.best.name == "last_layers 0.9"
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_room_can_be_called_like_its_function():
    from kappa_lightning import pilot as room

    assert inspect.signature(room) == inspect.signature(pilot)
    assert inspect.ismodule(room)
    with pytest.raises(ValueError, match="steps=0"):
        kappa_lightning.pilot(Plain, number_loaders, number_probe, steps=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 1.5}, ValueError, "target=1.5"),
        ({"level": float("nan")}, ValueError, "level=nan"),
        ({"min_retention": 0}, ValueError, "min_retention=0"),
        ({"hours": 0}, ValueError, "hours=0"),
        ({"margin": -0.1}, ValueError, "margin=-0.1"),
        ({"evaluations": 9}, ValueError, "evaluations=9 are more than the steps=8"),
        ({"workers": 0}, ValueError, "workers=0"),
        ({"confirm_seeds": True}, ValueError, "confirm_seeds=True"),
        ({"trainer": {"max_epochs": 3}}, ValueError, "trainer holds max_epochs"),
        ({"workers": 2}, ValueError, "make_module cannot be sent to another process"),
        ({"candidates": ["kapa 0.1"]}, ValueError, "'kapa 0.1' is unknown"),
        ({"hours": "2"}, TypeError, "hours='2' is a str"),
        ({"level": True}, TypeError, "level=True is a bool"),
        ({"trainer": pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)}, TypeError,
         "trainer is a Trainer"),
        ({"probes": {}}, TypeError, "probes is a dict of nothing"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_before_anything_is_run(options, error, message, monkeypatch):
    monkeypatch.setattr(executor, "run_trial", lambda *_: pytest.fail("something was run"))
    with pytest.raises(error, match=message):
        ask(Plain(), **options)


def test_function_that_gives_something_else_is_named():
    with pytest.raises(TypeError, match="make_module gave a Linear"):
        pilot(lambda: torch.nn.Linear(2, 2), number_loaders, number_probe, **SMALL)


def test_module_in_place_of_its_function_is_named():
    with pytest.raises(TypeError, match="make_module is a Plain: give a function that returns it"):
        pilot(Plain(), number_loaders, number_probe, **SMALL)
    with pytest.raises(TypeError, match="make_data is a tuple"):
        pilot(Plain, number_loaders(), number_probe, **SMALL)


def executing(tmp_path, candidates, **options):
    setup = Setup(Plain, number_loaders, number_probe, "val/loss", 8, 1)
    return executor.Executor(setup, candidates, Journal(tmp_path, {}), **options)


def test_time_that_does_not_suffice_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "run_trial", lambda setup, spec, by: Run(spec, (), (), {}, 1, 1, 10.0))
    execute = executing(tmp_path, {"full": candidate("full")}, limit=5.0)
    execute([Spec("full", 0, 0)])
    with pytest.raises(
        executor.OutOfTimeError, match=r"1 more of about 10 s would take 20 s, and 5 s .* give more hours"
    ):
        execute([Spec("full", 1, 0)])


def test_workers_that_die_or_import_the_script_say_what_to_do(tmp_path, monkeypatch):
    class Dying:
        def __init__(self, *args, **kwargs):
            self._processes = {}

        def submit(self, *args):
            raise BrokenProcessPool("a child process terminated abruptly")

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(executor, "ProcessPoolExecutor", Dying)
    execute = executing(tmp_path, {"full": candidate("full")}, workers=2)
    with pytest.raises(BrokenProcessPool, match="if __name__ == '__main__'"):
        execute([Spec("full", 0, 0), Spec("full", 1, 0)])
    with pytest.raises(ValueError, match="the candidate 'mine' cannot be sent to another process"):
        executing(tmp_path, {"mine": Candidate("mine", lambda module: [])}, workers=2)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="while a process of its workers imports your script"):
        executing(tmp_path, {"full": candidate("full")}, workers=2)


def entry(name="mine", **changes):
    interval = Interval(0.93, 0.92, 0.94, 3)
    values = {
        "name": name, "walked": True, "stage": "confirmed", "arrived": 3, "seeds": 3, "retention": interval,
        "nats": interval, "probes": {}, "factor": 2.0, "share": 0.5, "trainable": 1, "seconds": 1.0, "lowest_loss": 1.0,
        "p": 1.0, "in_set": True, "near": True, "keeps": False, "searched": 0.93, "init": None,
    }  # fmt: skip
    return Entry(**{**values, **changes})


def result_of(*entries, builds=None):
    settings = {"monitor": "val/loss", "always_train": ["head.*"]}
    return PilotResult(entries, 1.25, 4.0, 0.95, 0.01, 9, 60.0, (), {}, settings, builds or {})


def test_function_that_was_walked_back_is_walked_back_by_what_is_recommended():
    best = result_of(entry(), builds={"mine": mine}).best
    factor, only, back = best.callbacks(Plain())
    assert (factor.factor, only.include) == (2.0, ("head.weight",))
    assert (back.monitor, back.goal.monitor_limit, back.exclude) == ("val/loss", 1.25, ("head.*",))
    with pytest.raises(
        ValueError, match=r"'mine' is a function of yours, which looks at a module: callbacks\(module\)"
    ):
        best.callbacks()
    assert "RateFactor(2), and before a WalkBack" in best.yaml()


def test_walking_back_takes_the_pilots_probes_where_it_has_them():
    plain = [{"class_path": "kappa_lightning.WalkBack", "init_args": {"monitor": "val/loss", "monitor_limit": 1.25}}]
    probes = number_probe(Plain())
    walked = replace(result_of(entry(init=plain)), probes=probes).best.callbacks()[-1]
    assert walked.probes.keys() == probes.keys()
    assert walked.probes["old"] is not probes["old"]
    asked = replace(result_of(entry(init=plain)), probes=number_probe).best
    assert asked.callbacks()[-1].probes is None
    assert asked.callbacks(Plain())[-1].probes.keys() == probes.keys()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_candidate_that_the_module_cannot_use_is_shown_with_its_error_and_the_others_go_on(tmp_path, workers):
    result = pilot(
        Manual, number_loaders, number_probe, ["full", "sensitivity 0.5", "last_layers 0.9", "last_layers 1"],
        workers=workers, **{**SMALL, "confirm_seeds": 1},
    )  # fmt: skip
    assert {entry.name for entry in result.entries if entry.stage == "confirmed"} == {"full", "last_layers 0.9"}
    errors = {entry.name: entry for entry in result.entries if entry.stage == "failed"}
    assert "no matrix has at most 1 parameters" in errors.pop("last_layers 1").error
    (failed,) = errors.values()
    assert failed.name == "sensitivity 0.5"
    assert "adaptation_loss" in failed.error
    assert f"sensitivity 0.5: {failed.error}" in result.markdown
    assert failed.error in result.table
    result.save(tmp_path / "pilot.toml")
    assert PilotResult.load(tmp_path / "pilot.toml").table == result.table
    with pytest.raises(ValueError, match="adaptation_loss"):
        ask(Manual(), candidates=["sensitivity 0.5"], confirm_seeds=1)


def test_answer_says_no_more_than_was_found():
    alone = result_of(entry()).answer
    assert "no other one was confirmed" in alone
    assert "less than the 0.95 that was asked for, as do all that keep as much as the best" in alone
    beaten = result_of(entry(), entry("other", in_set=False, near=False)).answer
    assert "it keeps more than the others that were confirmed" in beaten
    nothing = Interval(float("nan"), float("nan"), float("nan"), 0)
    missed = result_of(entry(in_set=False, near=False, arrived=0, retention=nothing, nats=nothing))
    assert "No candidate came down to a loss of 1.25 with any seed of the confirmation" in missed.answer
    with pytest.raises(ValueError, match="No candidate came down"):
        _ = missed.best


def test_model_of_a_configuration_does_not_depend_on_the_run_that_asks_first(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    boring = "lightning.pytorch.demos.boring_classes"
    file.write_text(
        f"model: {{class_path: {boring}.BoringModel}}\ndata: {{class_path: {boring}.BoringDataModule}}\n"
        "trainer: {accelerator: cpu, logger: false}\n"
    )
    weights = []
    for seed in ("5", "6"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        state = torch.get_rng_state()
        weights.append(Configured(file).make_module().layer.weight)
        assert torch.equal(torch.get_rng_state(), state)
        assert os.environ["PL_GLOBAL_SEED"] == seed
    assert torch.equal(*weights)
