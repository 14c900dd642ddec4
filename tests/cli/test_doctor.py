import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import torch

from kappa_lightning.cli import main
from kappa_lightning.cli.commands import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch):
    """Sets what version of a package seems to be installed; ``None`` for none."""
    original = importlib.metadata.version

    def set_version(name, version):
        def ask(asked):
            if asked == name and version is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version if asked == name else original(asked)

        monkeypatch.setattr(importlib.metadata, "version", ask)

    return set_version


def test_doctor_says_what_is_installed_and_that_it_works(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"torch\s+{re.escape(torch.__version__.split('+')[0])}", out)
    assert out.count("\nok ") == 3 + torch.cuda.device_count()
    assert "FAILED" not in out
    assert out.endswith("no problem found\n")


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [("torchmetrics", None, "torchmetrics is missing"), ("peft", "0.1.dev0", r"peft 0\.1\.dev0 is older than 0\.21")],
)
def test_package_that_is_missing_or_too_old_is_a_problem_with_what_to_do(installed, capsys, name, version, problem):
    installed(name, version)
    assert main(["doctor", "--no-test"]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"problem: {problem}.*: pip install", out)
    assert out.endswith("1 problem found\n")


def test_package_that_only_some_need_may_be_missing(installed, capsys):
    installed("bitsandbytes", None)
    assert main(["doctor", "--no-test"]) == 0
    assert re.search(r"bitsandbytes\s+no\s", capsys.readouterr().out)


def test_what_does_not_work_is_said_and_does_not_stop_the_rest(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "condition_number", lambda matrix: torch.tensor(1.0))
    monkeypatch.setattr(doctor, "_wrong_fit", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^FAILED  κ on cpu", out, re.M)
    assert re.search(r"^ok  a profile", out, re.M)
    assert re.search(r"^problem: κ on cpu: κ of a 40×40 matrix is 1, and should be \d", out, re.M)
    assert re.search(r"^problem: a fit .*: ZeroDivisionError", out, re.M)


def test_oldest_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    oldest = dict(re.match(r"([\w-]+)[^>]*>=(.*)", line).groups() for line in asked if ">=" in line)
    known = {name.replace("_", "-"): version for name, version, *_ in doctor._PACKAGES}
    shared = known.keys() & oldest.keys()
    assert len(shared) >= 9
    assert {name: known[name] for name in shared} == {name: oldest[name] for name in shared}
