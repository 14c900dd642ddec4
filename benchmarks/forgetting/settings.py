"""The configuration of a comparison, a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.forgetting.methods import check_method
from benchmarks.forgetting.registry import TASKS
from benchmarks.forgetting.run import Plan


@dataclass(frozen=True)
class Settings:
    """What is compared; every field is an entry of the TOML file under its name.

    Attributes:
        task: a key of :data:`~benchmarks.forgetting.registry.TASKS`.
        methods: see :mod:`benchmarks.forgetting.methods`; ``full`` must be among them, since it sets the loss levels.
        lrs: the learning rates from which each method's is chosen.
        widen: how often the grid may grow, for each method, by one rate beyond the best one if that is at its end.
        seeds: of the runs that are reported.
        tuning_seed: of the runs by which the learning rates are chosen; none of ``seeds``.
        budget: the share of the candidates' parameters that trains.
        strengths: of the pull of ``l2_sp``, chosen together with its learning rate.
        epochs: evaluations of a run.
        steps_per_epoch: optimizer steps between them.
        levels: shares of full fine-tuning's adaptation at which retention is read.
        level: the one of them by which learning rates are chosen.
        options: of the task.

    Raises:
        ValueError: if an entry is out of range.
    """

    task: str
    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    epochs: int
    steps_per_epoch: int
    budget: float = 0.25
    strengths: tuple[float, ...] = (0.01, 0.1)
    levels: tuple[float, ...] = (0.8, 0.9, 0.95)
    level: float = 0.9
    widen: int = 0
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown: use one of {', '.join(map(repr, TASKS))}")
        for method in self.methods:
            check_method(method)
        if "full" not in self.methods:
            raise ValueError("methods lack 'full', whose loss sets the levels at which the others are compared")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is one of the seeds: tune on another")
        if not self.lrs or not self.seeds:
            raise ValueError("lrs and seeds need at least one entry each")
        if self.widen < 0:
            raise ValueError(f"widen={self.widen} must be at least 0")
        if self.level not in self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"level={self.level} must be one of levels={self.levels}, all between 0 and 1")

    @classmethod
    def read(cls, file: Path) -> Settings:
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
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}
        return cls(**values)

    def plans(self, method: str, seed: int, lrs: Sequence[float]) -> list[Plan]:
        """The runs of a method and a seed at some learning rates, and at every strength if the method has one."""
        return [
            Plan(
                task=self.task,
                method=method,
                lr=lr,
                seed=seed,
                budget=self.budget,
                strength=strength,
                epochs=self.epochs,
                steps_per_epoch=self.steps_per_epoch,
                options=dict(self.options),
            )
            for lr in lrs
            for strength in (self.strengths if method == "l2_sp" else (0.0,))
        ]
