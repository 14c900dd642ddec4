import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import kappa_lightning
from kappa_lightning import (
    ForgettingEval,
    KappaFreezeCallback,
    KappaMonitor,
    KappaProfile,
    Probe,
    Spectrum,
    condition_number,
    spectrum,
)

PACKAGE = pathlib.Path(kappa_lightning.__file__).parent
NAMES = [
    "KappaFreezeCallback", "KappaMonitor", "ForgettingEval", "Probe", "PerplexityProbe", "SimilarityProbe",
    "AccuracyProbe", "AgreementProbe", "KappaProfile", "Spectrum", "spectrum", "condition_number", "evaluate_probe",
    "GenerationProbe", "LMEvalProbe", "TrainedOnlyCheckpoint", "load_trained",
    "lora_targets", "pilot", "PretrainedAnchor", "WalkBack", "SensitivityFreezeCallback", "SensitivityProfile",
]  # fmt: skip
BUDGETS = {"top_p": None, "num_tensors": None, "max_kappa": None, "max_params": None, "criterion": "kappa"}
REQUIRED = inspect.Parameter.empty


def parameters(function):
    return {name: p for name, p in inspect.signature(function).parameters.items() if name not in ("self", "cls")}


def positional(function):
    """Name and default of what may be given by position, in order."""
    return [(n, p.default) for n, p in parameters(function).items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def keyword_only(function):
    return {n: p.default for n, p in parameters(function).items() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", NAMES)
def test_fixed_name_can_be_imported(name):
    assert name in kappa_lightning.__all__
    assert inspect.isclass(getattr(kappa_lightning, name)) == name[0].isupper()


def test_everything_public_is_listed_and_has_a_docstring():
    assert sorted(kappa_lightning.__all__) == kappa_lightning.__all__
    assert all(inspect.getdoc(getattr(kappa_lightning, name)) for name in kappa_lightning.__all__)


@pytest.mark.parametrize("function", [spectrum, condition_number])
def test_spectrum_takes_the_arguments_of_the_design(function):
    assert positional(function) == [("matrix", REQUIRED)]
    assert {"rtol": 1e-3, "solver": "auto"}.items() <= keyword_only(function).items()


def test_spectrum_has_the_fields_of_the_design():
    for field in ("kappa", "sigma_max", "sigma_min", "log_volume", "frobenius_norm", "rtol"):
        assert field in inspect.signature(Spectrum).parameters


@pytest.mark.parametrize(("method", "first"), [("from_model", "module"), ("from_checkpoint", "path")])
def test_profile_is_made_with_the_arguments_of_the_design(method, first):
    function = getattr(KappaProfile, method)
    assert positional(function) == [(first, REQUIRED)]
    expected = {"include": ("*",), "exclude": (), "device": None, "progress": True}
    assert expected.items() <= keyword_only(function).items()
    assert REQUIRED not in keyword_only(function).values()


def test_profile_methods_take_the_arguments_of_the_design():
    assert positional(KappaProfile.save) == [("path", REQUIRED)]
    assert positional(KappaProfile.load) == [("path", REQUIRED)]
    assert positional(KappaProfile.check) == [("module", REQUIRED)]
    assert positional(KappaProfile.select) == list(BUDGETS.items())


def test_freeze_callback_takes_the_arguments_of_the_design_in_its_order():
    rest = {
        "include": ("*",),
        "exclude": ("@embeddings",),
        "always_train": (),
        "train_vectors": False,
        "solver": "auto",
    }
    expected = [*BUDGETS.items(), *rest.items(), ("rtol", 1e-3), ("profile", None)]
    found = positional(KappaFreezeCallback)
    assert found[: len(expected)] == expected
    # What came after the design must be optional.
    assert all(default is not REQUIRED for _, default in found[len(expected) :])


def test_monitor_takes_the_arguments_of_the_design_in_its_order():
    assert positional(KappaMonitor) == [("every_n_epochs", None), ("tensors", "trainable"), ("figures", True)]


def test_forgetting_eval_takes_the_arguments_of_the_design_in_its_order():
    assert positional(ForgettingEval) == [
        ("probes", REQUIRED),
        ("every_n_epochs", None),
        ("min_retention", None),
        ("on_breach", "stop"),
    ]


def test_probe_takes_the_arguments_of_the_design_in_its_order():
    assert positional(Probe) == [("dataloader", REQUIRED), ("metric", REQUIRED), ("step", REQUIRED)]
    assert REQUIRED not in keyword_only(Probe).values()


NOT_INSTALLED = """
import importlib.metadata as metadata
original = metadata.version
def version(name):
    if name.replace("_", "-") == "kappa-lightning":
        raise metadata.PackageNotFoundError(name)
    return original(name)
metadata.version = version
import sys, torch, kappa_lightning
print(kappa_lightning.__version__)
kappa_lightning.KappaProfile.from_model(torch.nn.Linear(2, 2), progress=False).save(sys.argv[1])
"""


def test_checkout_that_is_not_installed_knows_its_version_and_saves_a_profile(tmp_path):
    command = [sys.executable, "-c", NOT_INSTALLED, str(tmp_path / "kappa.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", done.stdout.strip())
    assert f'"kappa_lightning": "{done.stdout.strip()}"' in (tmp_path / "kappa.json").read_text()


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.slow
def test_import_loads_no_library_that_only_some_users_have():
    # torchmetrics and lightning load some of these by themselves; what counts is what comes on top.
    code = (
        "import sys, torch, tqdm.auto, rich, torchmetrics, torchmetrics.text, lightning.pytorch\n"
        "before = set(sys.modules)\nimport kappa_lightning\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kappa_lightning" in loaded
    assert not {"transformers", "sklearn", "matplotlib", "peft", "safetensors", "scipy", "bitsandbytes"} & set(loaded)


@pytest.mark.parametrize(
    "statement", ["from kappa_lightning import KappaProfile, spectrum, condition_number", "import kappa_lightning.cli"]
)
def test_condition_numbers_and_the_command_load_no_lightning(statement):
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kappa_lightning" in loaded
    assert not {"lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "transformers"} & set(loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["from kappa_lightning import *", f"from kappa_lightning import {', '.join(NAMES)}"]
)
def test_every_name_can_be_imported_first_and_with_a_star(statement):
    code = f"{statement}\nprint(*sorted(name for name in dir() if name[0] != '_'))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == sorted(NAMES)


def test_dir_lists_what_is_not_loaded_yet():
    code = "import kappa_lightning\nprint(*dir(kappa_lightning))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(NAMES) <= set(names)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kappa_lightning' has no attribute 'KappaFreeze'"):
        kappa_lightning.KappaFreeze  # noqa: B018


def sources():
    return {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}


def room_of(path):
    """The first part below the package: ``spectra`` for spectra.py as for spectra/svd.py."""
    return path.parts[0].removesuffix(".py")


def imports_of(source):
    """Every module that a file imports, absolutely and by its full name, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms():
    """For each room the rooms that it imports, itself left out."""
    known = {room_of(path) for path in sources()} - {"__init__"}
    graph = {room: set() for room in known}
    for path, source in sources().items():
        if room_of(path) == "__init__":
            continue
        for name in imports_of(source):
            parts = name.split(".")
            if parts[0] == "kappa_lightning" and len(parts) > 1 and parts[1] in known:
                graph[room_of(path)].add(parts[1])
    return {room: imported - {room} for room, imported in graph.items()}


def test_only_callbacks_and_strategies_import_lightning():
    allowed = {"callbacks", "evaluation", "integrations", "strategies", "pilot", "cli", "__init__"}
    for path, source in sources().items():
        if room_of(path) not in allowed:
            roots = {name.split(".")[0] for name in imports_of(source)}
            assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}, path


def test_spectra_and_weights_know_no_other_room():
    assert rooms()["spectra"] == rooms()["fingerprint"] == set()
    # A weight that its layer computes is known by the fingerprint of what it is computed from.
    assert rooms()["weights"] <= {"fingerprint"}


def test_no_other_room_knows_the_callbacks_even_indirectly():
    graph = rooms()
    for room in graph.keys() - {"callbacks", "integrations", "strategies", "pilot", "cli", "__main__"}:
        seen, pending = set(), [room]
        while pending:
            new = graph[pending.pop()] - seen
            seen |= new
            pending += new
        assert not seen & {"callbacks", "strategies", "cli"}, room


def test_selection_knows_no_profile():
    assert "profile" not in rooms()["selection"]


def test_rooms_import_each_other_in_one_direction():
    graph = rooms()
    while graph:
        leaves = {room for room, imported in graph.items() if not imported & graph.keys()}
        assert leaves, f"these import each other in a circle: {sorted(graph)}"
        graph = {room: imported for room, imported in graph.items() if room not in leaves}


def test_no_module_is_imported_from_the_package_itself():
    # ``from kappa_lightning import X`` inside the package would load every room, and circles with it.
    allowed = {f"kappa_lightning.{room}" for room in rooms()}
    for path, source in sources().items():
        if room_of(path) != "__init__":
            names = {name for name in imports_of(source) if name.rpartition(".")[0] == "kappa_lightning"}
            assert names <= allowed, path
