"""The arrows between modules: one way, along the order of the rooms, and none hidden in a function."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from arrows import Arrow, against_the_order, arrows, circles, read_tree, rooms

ROOT = Path(__file__).parents[1]
FOLDERS = ("kappa_lightning", "recipes", "benchmarks", "examples", "tests")
OURS = FOLDERS[:4]

ORDER = [
    # What everything may stand on.
    "kappa_lightning.version",
    "kappa_lightning.arguments",
    "kappa_lightning.files",
    "kappa_lightning.fingerprint",
    "kappa_lightning.processes",
    "kappa_lightning.restoring",
    "kappa_lightning.text",
    # The way of one weight.
    "kappa_lightning.spectra",
    "kappa_lightning.weights",
    "kappa_lightning.parts",
    "kappa_lightning.information",
    "kappa_lightning.selection",
    "kappa_lightning.profile",
    # What a model says, which its sensitivity is of.
    "kappa_lightning.probes",
    "kappa_lightning.sensitivity",
    "kappa_lightning.tables",
    "kappa_lightning.figures",
    "kappa_lightning.lora",
    # What needs a model that runs.
    "kappa_lightning.evaluation",
    "kappa_lightning.anchoring",
    "kappa_lightning.strategies",
    "kappa_lightning.callbacks",
    "kappa_lightning.integrations",
    "kappa_lightning.pilot",
    "kappa_lightning.cli",
    "kappa_lightning.__main__",
    "kappa_lightning",
    # What is made with it. An example or a recipe stands for itself, so that it can be copied.
    "examples.*",
    "recipes.shared",
    "recipes.*",
    "recipes",
    "benchmarks.spectra",
    "benchmarks.*",
    "benchmarks",
]

WITH_LIGHTNING = {"probes", "evaluation", "strategies", "callbacks", "integrations", "pilot", "cli", "__main__"}
"""Rooms that may import Lightning; the others work with torch alone."""

LATE = [
    ("kappa_lightning", "[?]", "the public names: Lightning and torchmetrics take seconds to import"),
    ("kappa_lightning.callbacks.*", "kappa_lightning.callbacks.pictures", "Matplotlib takes about a second to import"),
    ("kappa_lightning.callbacks.monitor", "kappa_lightning.figures", "Matplotlib takes about a second to import"),
    ("kappa_lightning.callbacks.walk_back", "kappa_lightning.anchoring.figure", "Matplotlib, as above"),
    ("kappa_lightning.cli.registry", "[?]", "a command is found by its file's name"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.figures", "--help imports all commands: no Matplotlib"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.callbacks*", "--help imports all commands: no Lightning"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.probes*", "--help imports all commands: no torchmetrics"),
    ("kappa_lightning.cli.commands.walk_back", "[?]", "a function that the user names"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.anchoring*", "--help imports all commands: no torchmetrics"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.evaluation*", "--help imports all commands: no torchmetrics"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.sensitivity*", "--help imports all commands: no torchmetrics"),
    ("kappa_lightning.cli.commands.*", "kappa_lightning.pilot*", "--help imports all commands: no Lightning"),
]
"""Imports of our own modules in a function that are meant: who and what as globs ([?]: a name made up), and why."""


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_tree(ROOT, FOLDERS)


@pytest.fixture(scope="module")
def found(sources: dict[str, str]) -> list[Arrow]:
    return arrows(sources)


def late_and_not_meant(found: list[Arrow]) -> list[str]:
    late = [a for a in found if a.late and (a.imported == "?" or a.imported.split(".")[0] in OURS)]
    meant = [a for a in late for who, what, _ in LATE if fnmatchcase(a.importer, who) and fnmatchcase(a.imported, what)]
    return [str(a) for a in late if a.importer.split(".")[0] in OURS and a not in meant]


def lightning_outside(found: list[Arrow]) -> list[str]:
    return [
        str(a)
        for a in found
        if a.imported.split(".")[0] in ("lightning", "pytorch_lightning")
        and a.importer.startswith("kappa_lightning.")
        and a.importer.split(".")[1] not in WITH_LIGHTNING
    ]


def test_no_circle_of_modules_or_folders_in_the_whole_tree(found: list[Arrow], sources: dict[str, str]) -> None:
    assert circles(found, sources) == []


def test_rooms_import_only_what_stands_before_them(found: list[Arrow]) -> None:
    ours = [a for a in found if a.importer.split(".")[0] in OURS]
    assert against_the_order(ours, ORDER) == []


def test_nothing_but_tests_imports_tests(found: list[Arrow]) -> None:
    assert [str(a) for a in found if a.imported.split(".")[0] == "tests" and a.importer.split(".")[0] != "tests"] == []


def test_no_import_of_ours_hides_in_a_function(found: list[Arrow]) -> None:
    assert late_and_not_meant(found) == []


def test_only_rooms_that_need_a_trainer_import_lightning(found: list[Arrow]) -> None:
    assert lightning_outside(found) == []


def test_spectra_know_torch_alone(found: list[Arrow]) -> None:
    spectra = {a.imported.split(".")[0] for a in found if a.importer.startswith("kappa_lightning.spectra")}
    assert spectra & {"transformers", "lightning", "safetensors", "numpy", "scipy", "peft"} == set()
    imported = rooms(found, "kappa_lightning")["spectra"]
    assert imported == []


# The readers themselves, on trees that have the fault.


def test_circle_of_two_modules_is_found_also_through_a_function_and_through_a_package() -> None:
    tree = {"a.one": "from a.two import f", "a.two": "def f():\n    import a.one"}
    assert circles(arrows(tree), tree) == [["a.one", "a.two"]]
    tree = {"a.b.__init__": "from a.b.core import f", "a.b.core": "from a.b import g"}
    assert circles(arrows(tree), tree) == [["a.b", "a.b.core"]]
    tree = {"a.b.__init__": "from .core import f", "a.b.core": "from . import other", "a.b.other": "from ..c import g"}
    tree |= {"a.c": "from a.b.other import h"}
    assert ["a.b.other", "a.c"] in circles(arrows(tree), tree)


def test_circle_of_three_modules_is_found() -> None:
    tree = {"a.x": "import a.y", "a.y": "if True:\n    from a import z", "a.z": "from a.x import f"}
    assert circles(arrows(tree), tree) == [["a.x", "a.y", "a.z"]]


def test_circle_of_folders_is_found_where_no_module_is_in_one() -> None:
    tree = {"a.left.p": "", "a.left.q": "from a.right.p import f", "a.right.p": "", "a.right.q": "import a.left.p"}
    assert circles(arrows(tree), tree) == [["a.left", "a.right"]]
    tree = {"one.p": "", "one.q": "import two.p", "two.p": "", "two.q": "import one.p"}
    assert circles(arrows(tree), tree) == [["one", "two"]]


def test_tree_without_a_circle_has_none() -> None:
    tree = {"a.b.__init__": "from a.b.core import f", "a.b.core": "import torch", "a.c": "from a.b import f"}
    assert circles(arrows(tree), tree) == []


def test_arrow_against_the_order_is_found_also_in_a_function() -> None:
    order = ["a.low", "a.high"]
    for source in ("from a.high.part import f", "import a.high.part", "def f():\n    from a.high import part"):
        tree = {"a.low.mine": source, "a.high.part": ""}
        assert len(against_the_order(arrows(tree), order)) == 1, source
    tree = {"a.low.mine": "import torch", "a.high.part": "from a.low import mine"}
    assert against_the_order(arrows(tree), order) == []


def test_room_without_a_place_is_found() -> None:
    tree = {"a.low": "", "a.new": "import torch"}
    assert against_the_order(arrows(tree), ["a.low"]) == ["a.new is in no room of the order: say where it stands"]
    tree = {"a.low": "from a.new import f", "a.new": ""}
    assert "a.new is in no room" in against_the_order(arrows(tree), ["a.low"])[0]


def test_room_without_a_place_is_found_also_where_the_package_itself_has_one() -> None:
    tree = {"a.__init__": "", "a.new.__init__": "import torch"}
    assert against_the_order(arrows(tree), ["a.low", "a"]) == ["a.new is in no room of the order: say where it stands"]


def test_siblings_that_stand_for_themselves_may_not_import_each_other() -> None:
    tree = {"a.one": "import a.two", "a.two": "", "a.folder.p": "import a.folder.q", "a.folder.q": ""}
    assert against_the_order(arrows(tree), ["a.*"]) == ["a.one:1 imports a.two, which stands beside it"]


def test_late_import_of_ours_is_found_in_functions_methods_lambdas_and_by_name() -> None:
    for source in (
        "def f():\n    import kappa_lightning.cli",
        "class A:\n    async def f(self):\n        from kappa_lightning import cli",
        "f = lambda: __import__('kappa_lightning.cli')",
        "def f(name):\n    return importlib.import_module(name)",
        "def f():\n    from . import cli",
    ):
        tree = {"kappa_lightning.room": source, "kappa_lightning.cli": ""}
        assert len(late_and_not_meant(arrows(tree))) == 1, source
    assert late_and_not_meant(arrows({"kappa_lightning.room": "def f():\n    import peft"})) == []
    assert late_and_not_meant(arrows({"kappa_lightning.room": "if True:\n    import kappa_lightning.cli"})) == []


def test_lightning_in_a_room_for_torch_is_found() -> None:
    source = "from lightning.pytorch import Trainer"
    assert len(lightning_outside(arrows({"kappa_lightning.profile.compute": source}))) == 1
    assert lightning_outside(arrows({"kappa_lightning.callbacks.freeze": source})) == []
