"""The finished runs, a file each, so that an interruption loses none of them and nothing runs twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kappa_lightning.files import write_text
from kappa_lightning.pilot.trial import Run, Spec
from kappa_lightning.profile.file import encode

FORMAT = "kappa-lightning run"

_NAME = re.compile(r".*-[0-9a-f]{6}-step-?\d+-seed\d+-(search|confirm|all)\.json")


class Journal:
    """A folder of finished runs.

    Every run is a file of its own, written in one step, so that several processes may share the folder, and what is
    there is always whole. Runs of other settings are refused, since they would be compared with these.

    Args:
        folder: made if it is not there.
        settings: plain values on which every run depends.

    Raises:
        ValueError: if the folder has runs of other settings; the message names what differs.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(folder, {"steps": 3})
        ...     journal.add(Run(Spec("full", 0, 1), (), (), {}, 1, 1, 0.5))
        ...     [run.spec.candidate for run in Journal(folder, {"steps": 3}).runs()]
        ['full']
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = dict(json.loads(json.dumps(encode(dict(settings)))))
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if not file.is_file():
            write_text(file, json.dumps(self.settings, indent=1, sort_keys=True) + "\n")
            return
        known = _read(file)
        differ = sorted(key for key in known.keys() | self.settings.keys() if known.get(key) != self.settings.get(key))
        if differ:
            changes = "; ".join(f"{key} was {known.get(key)!r} and is {self.settings.get(key)!r}" for key in differ)
            raise ValueError(
                f"{self.folder} holds runs of other settings ({changes}): give another folder, or delete it"
            )

    def require(self, candidates: Mapping[str, Any]) -> None:
        """Take no runs of another candidate of the same name.

        Args:
            candidates: what each is, as plain values; ``None`` for what cannot be told, such as a function. Others
                may have runs here.

        Raises:
            ValueError: if a name was something else before.
        """
        file = self.folder / "candidates.json"
        now = json.loads(json.dumps(encode({name: what for name, what in candidates.items() if what is not None})))
        known = _read(file) if file.is_file() else {}
        for name, what in now.items():
            if known.get(name, what) != what:
                raise ValueError(
                    f"{self.folder} holds runs of another candidate {name!r}, which was {known[name]} and is {what}: "
                    "give it another name, or another folder"
                )
        if known | now != known:
            write_text(file, json.dumps(known | now, indent=1, sort_keys=True) + "\n")

    @staticmethod
    def settings_of(file: Path) -> dict[str, Any]:
        """The settings of the runs in a folder, from its file."""
        return _read(file)

    def file(self, spec: Spec) -> Path:
        """Where a run is kept."""
        words = re.sub(r"[^\w.]+", "-", spec.candidate).strip("-")
        # Two names may have the same words.
        mark = hashlib.sha256(spec.candidate.encode()).hexdigest()[:6]
        return self.folder / f"{words}-{mark}-step{spec.step}-seed{spec.seed}-{spec.half}.json"

    def find(self, spec: Spec) -> Run | None:
        """The finished run of a spec, if there is one.

        Raises:
            ValueError: if its file is damaged.
        """
        file = self.file(spec)
        return _run(file) if file.is_file() else None

    def add(self, run: Run) -> None:
        """Keep a finished run."""
        document = {
            "format": FORMAT,
            "versions": {"kappa_lightning": version("kappa-lightning"), "torch": torch.__version__},
            **run.to_dict(),
        }
        write_text(self.file(run.spec), json.dumps(encode(document), allow_nan=False) + "\n")

    def runs(self) -> Iterator[Run]:
        """All finished runs, in the order of their names."""
        for file in sorted(self.folder.glob("*-step*-seed*.json")):
            if _NAME.fullmatch(file.name):  # a user may keep results beside them
                yield _run(file)


def _run(file: Path) -> Run:
    entry = _read(file)
    if entry.get("format") != FORMAT:
        raise ValueError(f"{file} is no finished run: delete it")
    return Run.from_dict(_decoded(entry))


def _read(file: Path) -> dict[str, Any]:
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}): delete it, and its run is done again") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{file} is JSON, but no object: delete it")
    return entry


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    return float(value) if value in ("inf", "-inf") else value
