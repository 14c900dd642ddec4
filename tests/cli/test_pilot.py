import json

import pytest
import yaml

from kappa_lightning.cli import main
from kappa_lightning.pilot import OutOfTimeError, PilotResult
from kappa_lightning.pilot.configured import Configured

CONFIG = {
    "model": {"class_path": "outside.Plain"},
    "data": {"class_path": "outside.NumberData"},
    "trainer": {
        "accelerator": "cpu",
        "gradient_clip_val": 1.0,
        "max_epochs": 7,
        "callbacks": [
            {"class_path": "kappa_lightning.KappaMonitor"},
            {
                "class_path": "kappa_lightning.ForgettingEval",
                "init_args": {"probes": {"old": {"class_path": "outside.NumberProbe"}}},
            },
        ],
    },
    "pilot": {
        "candidates": ["full"], "steps": 8, "evaluations": 1, "level": 1.05, "race_seeds": 0, "confirm_seeds": 1,
        "progress": False,
    },
}  # fmt: skip


def written(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


@pytest.mark.slow
def test_command_runs_a_configuration_and_writes_its_page(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["pilot", str(written(tmp_path)), "--out", str(out), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "Use full" in printed
    result = PilotResult.load(out / "pilot.toml")
    assert result.best.name == "full"
    assert (out / "index.html").is_file()
    settings = json.loads((out / "runs" / "settings.json").read_text())
    # Of the Trainer's arguments those of the user's own run, without what a pilot sets itself.
    assert settings["trainer"] == {"accelerator": "'cpu'", "gradient_clip_val": "1.0"}
    assert {run.stem.rpartition("-")[2] for run in (out / "runs").glob("full*")} == {"search", "confirm"}
    seconds = result.seconds
    assert main(["pilot", str(written(tmp_path)), "--out", str(out), "--seed", "3"]) == 0
    assert PilotResult.load(out / "pilot.toml").seconds == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "model needs a class_path"),
        ({"pilot": {"stepz": 3}}, "stepz"),
        ({"pilot": {"trainer": {"precision": 32}}}, "multiple values for keyword argument 'trainer'"),
        ({"trainer": {"accelerator": "cpu"}}, "no ForgettingEval"),
    ],
)
def test_configuration_that_lacks_something_is_one_line(changes, message, tmp_path, capsys):
    options = {**CONFIG["pilot"], **changes.get("pilot", {})}
    path = written(tmp_path, **{**changes, "pilot": options})
    assert main(["pilot", str(path), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_lack_of_time_is_one_line_and_an_error_says_of_which_candidate(tmp_path, capsys, monkeypatch):
    def failing(*args, **options):
        raise error

    monkeypatch.setattr("kappa_lightning.pilot.pilot", failing)
    error = OutOfTimeError("the hours do not suffice")
    assert main(["pilot", str(written(tmp_path))]) == 1
    assert capsys.readouterr().err.strip().endswith("error: the hours do not suffice")
    error = ValueError("nothing to adapt")
    error.add_note("in a run of the candidate 'lora r4'")
    assert main(["pilot", str(written(tmp_path))]) == 1
    assert "nothing to adapt (in a run of the candidate 'lora r4')" in capsys.readouterr().err


def test_what_is_no_configuration_is_named(tmp_path):
    for text, message in (("a: [", "is no YAML"), ("3", "is no configuration")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Configured(tmp_path / "x.yaml")
