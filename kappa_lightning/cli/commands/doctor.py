"""``kappa-lightning doctor``: what is installed, what works with it, and whether it does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from rich import box
from rich.table import Table

from kappa_lightning.cli.command import Command
from kappa_lightning.cli.terminal import print_table, say
from kappa_lightning.profile import KappaProfile
from kappa_lightning.spectra import condition_number
from kappa_lightning.text import counted, printable
from kappa_lightning.version import __version__

# Distribution, oldest version that is known to work, whether all needs it, and what it is for.
_PACKAGES = (
    ("torch", "2.11", True, "everything"),
    ("lightning", "2.6.1", True, "the callbacks"),
    ("torchmetrics", "1.8", True, "probes and ForgettingEval"),
    ("safetensors", "0.5", True, "checkpoints on disk"),
    ("matplotlib", "3.9", True, "figures"),
    ("tensorboard", "2.18", True, "pictures in TensorBoard"),
    ("jsonargparse", "4.40", False, "LightningCLI with a YAML file"),
    ("transformers", "5.17", False, "pretrained models"),
    ("huggingface_hub", "0.30", False, "scanning a model of the hub's cache by its id"),
    ("peft", "0.21", False, "LoRA on a choice: lora_targets"),
    ("bitsandbytes", "0.45", False, "condition numbers of models in 8 and 4 bit"),
    ("lm_eval", "0.4.10", False, "benchmarks of language models as probes"),
)
_LEAST_WIDTH = 60


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--no-test", action="store_true", help="only say what is installed")


def _doctor(args: Namespace) -> int:
    say(f"kappa-lightning {__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(f"computes on: {_devices()}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("package", no_wrap=True)
    table.add_column("installed", no_wrap=True)
    table.add_column("for")
    problems = []
    for name, oldest, needed, purpose in _PACKAGES:
        found = _installed(name)
        state = found or "no"
        if found is not None and Version(found) < Version(oldest):
            state = f"{found}, too old"
            problems.append(f"{name} {found} is older than {oldest}: pip install --upgrade {name}")
        elif found is None and needed:
            problems.append(f"{name} is missing: pip install kappa-lightning")
        table.add_row(name, state, purpose)
    print_table(table, least_width=_LEAST_WIDTH)
    if _installed("lightning") and _installed("pytorch_lightning"):
        say("note: import lightning.pytorch, not pytorch_lightning: its Trainer does not take these callbacks")
    if not args.no_test:
        for title, test in _tests().items():
            problems += _tried(title, test)
    for problem in problems:
        say(f"problem: {problem}")
    say(f"{counted(len(problems), 'problem')} found" if problems else "no problem found")
    return 1 if problems else 0


def _devices() -> str:
    names = [f"{torch.cuda.get_device_name(index)} (cuda:{index})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps; κ itself on the CPU)")
    return ", ".join([f"CPU with {counted(torch.get_num_threads(), 'thread')}", *map(printable, names)])


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tried(title: str, test: Callable[[], str | None]) -> list[str]:
    """Run a test and say how it went; what went wrong, if anything."""
    start = time.perf_counter()
    try:
        wrong = test()
    except Exception as error:  # noqa: BLE001 - whatever breaks is what this command is there to tell
        wrong = f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
    say(f"{'ok' if wrong is None else 'FAILED'}  {title} ({time.perf_counter() - start:.1f} s)")
    return [] if wrong is None else [f"{title}: {wrong}"]


def _tests() -> dict[str, Callable[[], str | None]]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    tests: dict[str, Callable[[], str | None]] = {f"κ on {name}": partial(_wrong_kappa, name) for name in devices}
    return {**tests, "a profile to disk and back": _wrong_profile, "a fit with all three callbacks": _wrong_fit}


def _wrong_kappa(device: str) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 40), (480, 480), (900, 300)):
        matrix = torch.randn(shape, generator=generator)
        sigma = torch.linalg.svdvals(matrix.double())
        exact, found = float(sigma[0] / sigma[-1]), float(condition_number(matrix.to(device)))
        if abs(found - exact) > 1e-3 * exact:
            return f"κ of a {shape[0]}×{shape[1]} matrix is {found:.6g}, and should be {exact:.6g}"
    return None


def _wrong_profile() -> str | None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    profile = KappaProfile.from_model(net, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "kappa.json")
        loaded = KappaProfile.load(Path(folder) / "kappa.json")
    loaded.check(net)
    return None if loaded == profile else "what was read is not what was written"


def _wrong_fit() -> str | None:
    # Lightning takes seconds to import, which no other part of this command needs.
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel
    from torchmetrics import MeanMetric

    from kappa_lightning.callbacks import ForgettingEval, KappaFreezeCallback, KappaMonitor
    from kappa_lightning.probes import Probe

    class Two(BoringModel):
        """A frozen layer in front of the one that trains."""

        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(32, 32)

        def forward(self, x: Any) -> Any:
            return self.layer(self.first(x))

    class Size(MeanMetric):
        """How large the outputs are."""

        higher_is_better = False  # type: ignore[assignment]

    module = Two()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    freeze, monitor = KappaFreezeCallback(num_tensors=1), KappaMonitor(tensors="all")
    probe = Probe(module.val_dataloader(), Size(), lambda model, batch: model(batch).abs())
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = pl.Trainer(
            default_root_dir=folder, accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[freeze, monitor, ForgettingEval({"itself": probe})],
        )  # fmt: skip
        trainer.fit(module)
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    if moved != set(freeze.trained_names):
        return f"{sorted(freeze.trained_names)} should train, and {sorted(moved)} did"
    logged = {"kappa/median", "kappa_drift/max", "forgetting/retention"} - trainer.callback_metrics.keys()
    return f"{', '.join(sorted(logged))} was not logged" if logged else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning logs and warns of, which is not what was asked for."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


COMMAND = Command(
    summary="say what is installed and what works with it, and test it",
    description="Say which of the packages that this one works with are installed, where it can compute, and what\n"
    "each is for; then try it out, which takes about ten seconds. The exit status is 1 if there is a problem.",
    example="kappa-lightning doctor",
    add_arguments=_add_arguments,
    run=_doctor,
)
