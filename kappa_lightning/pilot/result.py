"""What a pilot found: a table, the front of loss against retention, and the callbacks of what it recommends."""

from __future__ import annotations

import copy
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from kappa_lightning.callbacks import WalkBack
from kappa_lightning.files import write_text
from kappa_lightning.pilot.adaptation import Point
from kappa_lightning.pilot.candidates import Build, make_callback, walk_back_of
from kappa_lightning.pilot.entry import Entry, FrontPoint, front_of
from kappa_lightning.pilot.given import Probes, probes_of
from kappa_lightning.pilot.plain import decoded, encoded
from kappa_lightning.pilot.rates import RateFactor
from kappa_lightning.pilot.report import answer_of, callbacks_yaml, figure_of, page_of, table_of, write_report
from kappa_lightning.pilot.statistics import Interval

FORMAT = "kappa-lightning pilot"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Recommendation:
    """An entry and what makes its callbacks.

    Attributes:
        entry: the row of the table.
        build: from a module to callbacks; ``None`` if the result was read from a file.
        back: what walks back behind a function of the user's, as a configuration has it.
        probes: those of the pilot, or a function from the module to them; ``None`` if the result was read from a file.
    """

    entry: Entry
    build: Build | None
    back: Sequence[Mapping[str, Any]] = ()
    probes: Probes | None = None

    @property
    def name(self) -> str:
        """The candidate."""
        return self.entry.name

    def callbacks(self, module: Any = None) -> list[Callback]:
        """New callbacks for a Trainer: the factor on the learning rates first, then the candidate's.

        An entry that was walked back has a :class:`~kappa_lightning.WalkBack` behind them, with a copy of the pilot's
        probes; where they are a function and no module is given, or the result was read from a file, with those of the
        ``ForgettingEval`` that your Trainer must then have.

        Args:
            module: what is to be trained; only a candidate that is a function of the user's, and probes that are one,
                need it.

        Raises:
            ValueError: if the candidate is a function of the user's, and there is no module, or the result was read
                from a file.
        """
        if self.entry.init is not None:
            return [self._with_probes(make_callback(spec), module) for spec in self.entry.init]
        if self.build is None:
            raise ValueError(f"{self.name!r} is a function of yours, which a file does not hold: call it yourself")
        if module is None:
            raise ValueError(f"{self.name!r} is a function of yours, which looks at a module: callbacks(module)")
        back = [self._with_probes(make_callback(spec), module) for spec in self.back]
        return [RateFactor(self.entry.factor), *self.build(module), *back]

    def _with_probes(self, callback: Callback, module: Any) -> Callback:
        given = self.probes
        if isinstance(callback, WalkBack) and given is not None and (isinstance(given, Mapping) or module is not None):
            callback.probes = copy.deepcopy(dict(probes_of(given, module)))
        return callback

    def yaml(self) -> str:
        """The callbacks as the ``trainer.callbacks`` of a LightningCLI configuration."""
        return callbacks_yaml(self.entry)


@dataclass(frozen=True)
class PilotResult:
    """What a pilot found.

    Attributes:
        entries: the rows: what keeps as much as the best first, the cheapest of it first; then what cannot be told from
            it, but keeps less in the mean; then the others by how far they came and what they kept.
        level: the held-out loss at which everything was read.
        start_loss: the held-out loss of the pretrained module.
        min_retention: what was asked for.
        margin: the difference in retention that did not count.
        runs: how many were made.
        seconds: what they took together.
        unfinished: the stages that the time did not suffice for.
        paths: the (loss, retention) paths that the picture shows, by entry and run.
        settings: what the pilot was asked.
        builds: by candidate what makes its callbacks; empty if the result was read from a file.
        probes: as the pilot was given them; ``None`` if the result was read from a file.
    """

    entries: Sequence[Entry]
    level: float
    start_loss: float
    min_retention: float
    margin: float
    runs: int
    seconds: float
    unfinished: Sequence[str]
    paths: Mapping[str, Sequence[Sequence[Point]]]
    settings: Mapping[str, Any]
    builds: Mapping[str, Build] = field(default_factory=dict, repr=False, compare=False)
    probes: Probes | None = field(default=None, repr=False, compare=False)

    @property
    def table(self) -> str:
        """The table as text."""
        return table_of(self.entries)

    @property
    def answer(self) -> str:
        """The answer in a sentence or two."""
        return answer_of(self)

    @property
    def markdown(self) -> str:
        """The page as Markdown, without its picture."""
        return page_of(self)

    @property
    def front(self) -> list[FrontPoint]:
        """The points of loss against retention that no other beats in both."""
        return front_of(self.paths)

    @property
    def chosen(self) -> list[Entry]:
        """The set that keeps as much as the best: what keeps ``min_retention`` first, then the cheapest.

        It cannot be told from the best, and its mean is within ``margin`` of it.
        """
        return [entry for entry in self.entries if entry.near]

    @property
    def undecided(self) -> list[Entry]:
        """What cannot be told from the best either, but keeps less in the mean: more seeds would say."""
        return [entry for entry in self.entries if entry.in_set and not entry.near]

    @property
    def best(self) -> Recommendation:
        """The first of the set.

        Raises:
            ValueError: if nothing was confirmed.
        """
        if not self.chosen:
            raise ValueError(self.answer)
        entry = self.chosen[0]
        back = walk_back_of(self.settings["monitor"], self.level, self.settings["always_train"])
        again = [back.to_dict()] if entry.walked else []
        return Recommendation(entry, self.builds.get(entry.name), again, self.probes)

    def figure(self) -> Figure:
        """Loss against retention, a line for each run, and the front."""
        return figure_of(self)

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write the page: ``index.html`` with the picture in it, ``report.md`` and ``pilot.png``, ``callbacks.yaml``.

        Returns:
            The HTML file.
        """
        return write_report(self, Path(folder), self.best.yaml() if self.chosen else None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file, in one step.

        Args:
            path: ends in ``.toml`` or ``.json``.

        Raises:
            ValueError: if it ends otherwise.
        """
        kind = _kind(path)
        document = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **encoded(self._plain())}
        write_text(path, tomli_w.dumps(document) if kind == ".toml" else json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PilotResult:
        """Read a result from a file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no result of a pilot, or of a newer version.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            document = tomllib.loads(text) if _kind(path) == ".toml" else json.loads(text)
        except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of a pilot or a damaged one ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{path} is no result of a pilot: it lacks the entry format={FORMAT!r}")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {document.get('schema_version')}: update the package")
        plain = decoded({key: v for key, v in document.items() if key not in ("format", "schema_version")})
        entries = [_entry(row) for row in plain.pop("entries")]
        paths = {
            label: [[Point(position, loss, {"mean": kept}) for position, loss, kept in run] for run in runs]
            for label, runs in plain.pop("paths").items()
        }
        return cls(entries=entries, paths=paths, **{"margin": 0.0, **plain})

    def _plain(self) -> dict[str, Any]:
        paths = {
            label: [[[p.position, p.loss, sum(p.retention.values()) / len(p.retention)] for p in run] for run in runs]
            for label, runs in self.paths.items()
        }
        names = ("level", "start_loss", "min_retention", "margin", "runs", "seconds", "unfinished", "settings")
        rows = [{key: v for key, v in asdict(entry).items() if v is not None} for entry in self.entries]
        return {**{name: getattr(self, name) for name in names}, "entries": rows, "paths": paths}


def _entry(row: Mapping[str, Any]) -> Entry:
    intervals = {key: Interval(**row[key]) for key in ("retention", "nats")}
    return Entry(**{"init": None, "searched": math.nan, "near": row["in_set"], **row, **intervals})


def _kind(path: str | os.PathLike[str]) -> str:
    kind = Path(path).suffix
    if kind not in (".toml", ".json"):
        raise ValueError(f"{path}: the name must end in .toml or .json")
    return kind
