"""The protocol of a comparison, a TOML file that is written down and committed before its runs."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.forgetting.registry import TASKS

LINE = " walked back"
"""Behind a method's name: read on the way back from the end of its runs."""


@dataclass(frozen=True)
class Protocol:
    """What is compared, how, and which contrast decides; every field is an entry of the TOML file under its name.

    Attributes:
        task: a key of :data:`~benchmarks.forgetting.registry.TASKS`.
        methods: candidates of :mod:`kappa_lightning.pilot.candidates` or of :mod:`benchmarks.forgetting.controls`.
        primary: the pairs (one, other) that decide; their p-values are one family.
        secondary: further pairs, another family.
        lr: the learning rate that the factors multiply.
        seeds: of the runs that are reported.
        tuning_seed: of the runs that find each method's rate.
        steps: optimizer steps of a run.
        evaluations: of loss and probes in a run.
        level: the held-out loss at which everything is read; if there is none, ``target`` sets it.
        target: the share of the adaptation of the best full run, over ``level_steps``, at which everything is read.
        level_steps: the steps of the rates of these runs of full fine-tuning.
        starts: for a method the step of the rate where its search begins; 0 for the others.
        climbs: faster rates that are tried at a seed that does not arrive.
        blends: points on the way back.
        exclude: globs of what no choice takes; full fine-tuning trains it.
        trainer: arguments of the Trainer.
        options: of the task.

    Raises:
        ValueError: if an entry is out of range.
    """

    task: str
    methods: tuple[str, ...]
    primary: tuple[tuple[str, str], ...]
    lr: float
    seeds: tuple[int, ...]
    tuning_seed: int
    steps: int
    evaluations: int
    secondary: tuple[tuple[str, str], ...] = ()
    level: float | None = None
    target: float = 0.9
    level_steps: tuple[int, ...] = (-4, -2, 0, 2)
    starts: Mapping[str, int] = field(default_factory=dict)
    climbs: int = 3
    blends: int = 5
    exclude: tuple[str, ...] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown: use one of {', '.join(map(repr, TASKS))}")
        if not self.methods or not self.seeds:
            raise ValueError("methods and seeds need at least one entry each")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is one of the seeds: tune on another")
        for pair in (*self.primary, *self.secondary):
            for method in pair:
                if method.removesuffix(LINE) not in self.methods:
                    raise ValueError(f"the contrast {list(pair)} names {method!r}, which is none of the methods")
        for method in self.starts:
            if method not in self.methods:
                raise ValueError(f"starts names {method!r}, which is none of the methods")
        if self.level is None and "full" not in self.methods:
            raise ValueError("methods lack 'full', whose loss sets the level: add it, or give a level")
        if not 0 < self.target < 1:
            raise ValueError(f"target={self.target} must be between 0 and 1")

    @classmethod
    def read(cls, file: Path) -> Protocol:
        """Read a TOML file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no TOML, or an entry is missing, unknown or out of range.
        """
        with file.open("rb") as stream:
            entries = tomllib.load(stream)
        known = {entry.name for entry in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        unknown, missing = sorted(entries.keys() - known), sorted(required - entries.keys())
        if unknown or missing:
            raise ValueError(f"{file}: unknown entries: {unknown}; missing entries: {missing}")
        return cls(**{key: _frozen(value) for key, value in entries.items()})

    def settings(self) -> dict[str, Any]:
        """What every run depends on; which methods, seeds and contrasts there are may grow."""
        names = ("task", "lr", "steps", "evaluations", "blends", "exclude", "trainer", "options")
        settings = {name: getattr(self, name) for name in names}
        # Paths differ from machine to machine.
        settings["options"] = {k: v for k, v in self.options.items() if k not in ("problems", "text", "sts")}
        return settings

    def mark(self) -> str:
        """Eight hexadecimal digits that tell runs of other settings."""
        text = json.dumps(self.settings(), sort_keys=True, default=dict)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
