"""The candidates by name: what each puts beside the user's module for a run.

=============================  =======================================================================================
``full``                       everything trains
``matrices``                   all matrices train, and no vector (bias, norm), as with every choice below
``kappa 0.25``                 the matrices of lowest κ within a quarter of the candidates' parameters; other criteria:
                               ``random``, ``excess_kappa``, ``reversed:kappa``, … (``kappa_lightning.selection``)
``sensitivity``                what learns most for what it changes; the budget comes out of it, or is given as above
``sensitivity rates``          everything trains, each tensor at a rate of its own
``sensitivity:path 0.25``      the same choice along first steps of training, of all pairs of tensors, which is what
                               ``sensitivity`` is for all but language models
``@gate_up``                   all matrices of a group; several groups or globs are joined with a comma
``last_layers 0.25``           the last matrices of the model within a budget
``lora r16``                   LoRA on every linear layer; ``a32`` sets α (twice the rank by default)
``lora r16 on kappa 0.25``     LoRA on a choice: a criterion with its budget, or groups and globs
``… + anchor``                 with :class:`~kappa_lightning.PretrainedAnchor`; ``+ anchor 10`` sets its strength
=============================  =======================================================================================

Walking back is no candidate of its own: it is read off the end of every run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from kappa_lightning.callbacks import KappaFreezeCallback, PretrainedAnchor, SensitivityFreezeCallback, WalkBack
from kappa_lightning.pilot.adapters import LoraAdapters
from kappa_lightning.pilot.rates import RateFactor
from kappa_lightning.pilot.train_only import TrainOnly
from kappa_lightning.selection import criterion_of
from kappa_lightning.weights import find_weights
from kappa_lightning.weights.patterns import check_patterns, included, match_parameters

Build = Callable[[pl.LightningModule], Sequence[Callback]]
"""From a module before its fit to the callbacks that run along with it."""

_BUDGET = re.compile(r"(?P<what>.+?)\s+(?P<budget>0?\.\d+|[01]\.\d*|\d+)")
_LORA = re.compile(r"lora(?:\s+r(?P<rank>\d+))?(?:\s+a(?P<alpha>\d+(?:\.\d+)?))?(?:\s+on\s+(?P<on>.+))?")
_ANCHOR = re.compile(r"anchor(?:\s+(?P<strength>\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class CallbackSpec:
    """A callback as a LightningCLI configuration has it.

    Attributes:
        kind: its class.
        init_args: plain values.
    """

    kind: type[Callback]
    init_args: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Callback:
        """The callback."""
        return self.kind(**self.init_args)

    def to_dict(self) -> dict[str, Any]:
        """``class_path`` and ``init_args``."""
        init_args = {name: list(v) if isinstance(v, tuple) else v for name, v in self.init_args.items()}
        # The public name: that of the room, not of the file.
        room = (
            "kappa_lightning.pilot" if self.kind.__module__.startswith("kappa_lightning.pilot.") else "kappa_lightning"
        )
        return {"class_path": f"{room}.{self.kind.__name__}", "init_args": init_args}


Specs = Callable[[pl.LightningModule], list[CallbackSpec]]


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        name: of the table.
        build: makes the callbacks for a module. It may change ``requires_grad`` of the module itself, too.
        specs: the same as a configuration has it; ``None`` for a function of the user's.
        source: the words that :func:`candidate` made it from, if any.
        options: the arguments that it got beside them.
    """

    name: str
    build: Build
    specs: Specs | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        # What words make is no function at the top of a module: another process makes it anew.
        if self.source is not None:
            return _again, (self.name, self.source, dict(self.options))
        return Candidate, (self.name, self.build, self.specs)

    @classmethod
    def of_specs(cls, name: str, specs: Specs) -> Candidate:
        """A candidate that a configuration can hold."""
        return cls(name, lambda module: [spec.make() for spec in specs(module)], specs)


def candidate(name: str, *, always_train: Sequence[str] = (), exclude: Sequence[str] = (), seed: int = 0) -> Candidate:
    """The candidate of a name.

    Args:
        name: see the module's table.
        always_train: globs of what is new (heads, projectors) and trains with every candidate.
        exclude: globs of what no choice takes and every choice leaves frozen.
        seed: of ``random``.

    Raises:
        ValueError: if there is none of that name, or it needs a budget and has none.

    Example:
        >>> [type(callback).__name__ for callback in candidate("kappa 0.25").build(None)]
        ['KappaFreezeCallback']
    """
    base, *additions = [part.strip() for part in name.split("+")]
    parts = [_base(base, name, tuple(always_train), tuple(exclude), seed)]
    parts += [_addition(addition, name) for addition in additions]
    made = Candidate.of_specs(name, lambda module: [spec for part in parts for spec in part(module)])
    options = {"always_train": tuple(always_train), "exclude": tuple(exclude), "seed": seed}
    return replace(made, source=name, options=options)


def _again(name: str, source: str, options: Mapping[str, Any]) -> Candidate:
    return replace(candidate(source, **options), name=name)


def candidates_of(
    asked: Sequence[str | Candidate | Build] | Mapping[str, str | Build],
    *,
    always_train: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> list[Candidate]:
    """Names, functions and candidates as candidates, each name once.

    Args:
        asked: a list, in which a function goes by its own name; or a mapping from names.
        always_train: see :func:`candidate`.
        exclude: see :func:`candidate`.
        seed: see :func:`candidate`.

    Raises:
        TypeError: if an entry is neither a name nor a function nor a :class:`Candidate`.
        ValueError: as :func:`candidate`, or if two have one name.
    """
    if isinstance(asked, str):
        raise TypeError(f"candidates={asked!r} is one string: give a list of names, such as [{asked!r}]")
    entries: list[tuple[str | None, Any]] = (
        list(asked.items()) if isinstance(asked, Mapping) else [(None, entry) for entry in asked]
    )
    found: list[Candidate] = []
    for name, entry in entries:
        if isinstance(entry, str):
            made = candidate(entry, always_train=always_train, exclude=exclude, seed=seed)
            found.append(made if name is None else replace(made, name=name))
        elif isinstance(entry, Candidate):
            found.append(entry if name is None else replace(entry, name=name))
        elif callable(entry):
            found.append(Candidate(name or str(getattr(entry, "__name__", type(entry).__name__)), entry))
        else:
            raise TypeError(
                f"candidates: {entry!r} is a {type(entry).__name__}: give a name, or a function from a module to "
                "callbacks"
            )
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"candidates: {', '.join(map(repr, twice))} is there more than once")
    if not found:
        raise ValueError("candidates is empty: give at least one name")
    return found


def make_callback(spec: Mapping[str, Any]) -> Callback:
    """The callback of a ``class_path`` and ``init_args`` that a candidate gave.

    Raises:
        ValueError: if the class is none that a candidate gives.
    """
    own = (RateFactor, TrainOnly, LoraAdapters)
    for kind in (*own, KappaFreezeCallback, SensitivityFreezeCallback, PretrainedAnchor, WalkBack):
        if CallbackSpec(kind).to_dict()["class_path"] == spec["class_path"]:
            made: Callback = kind(**spec["init_args"])
            return made
    raise ValueError(f"{spec['class_path']} is no callback of a candidate")


def walk_back_of(monitor: str, level: float, always_train: Sequence[str]) -> CallbackSpec:
    """What walks back to a level of the loss, as a pilot reads it: what is new stays as trained."""
    new = {"exclude": tuple(always_train)} if always_train else {}
    return CallbackSpec(WalkBack, {"monitor": monitor, "monitor_limit": level, **new})


def _base(base: str, name: str, always_train: tuple[str, ...], exclude: tuple[str, ...], seed: int) -> Specs:
    if base == "full":
        return lambda module: []
    if base == "matrices":
        return lambda module: [CallbackSpec(TrainOnly, {"always_train": always_train})]
    if base.startswith("@") or "*" in base:
        include = check_patterns([part.strip() for part in base.split(",")], argument=f"candidates: {name!r}")
        only = {"include": include, "always_train": always_train} | ({"exclude": exclude} if exclude else {})
        return lambda module: [CallbackSpec(TrainOnly, only)]
    if lora := _LORA.fullmatch(base):
        return _lora(lora, name, always_train, exclude, seed)
    common: dict[str, Any] = {"always_train": always_train, "seed": seed} | ({"exclude": exclude} if exclude else {})
    if base == "sensitivity rates":
        return lambda module: [CallbackSpec(SensitivityFreezeCallback, {"rates": True, **common})]
    found = _BUDGET.fullmatch(base)
    what, budget = (found["what"], _number(found["budget"])) if found else (base, None)
    if what in ("sensitivity", "sensitivity:path"):
        limit: dict[str, Any] = {} if budget is None else {"max_params": budget}
        limit |= {"method": "path"} if what.endswith(":path") else {}
        return lambda module: [CallbackSpec(SensitivityFreezeCallback, {**limit, **common})]
    if not _known(what):
        raise ValueError(_unknown(name))
    if budget is None:
        raise ValueError(
            f"candidates: {name!r} needs a budget: write the share of the parameters that trains, such as '{base} 0.25'"
        )
    if what == "last_layers":
        return lambda module: [_last_layers(module, budget, always_train, exclude)]
    return lambda module: [CallbackSpec(KappaFreezeCallback, {"max_params": budget, "criterion": what, **common})]


def _addition(addition: str, name: str) -> Specs:
    anchor = _ANCHOR.fullmatch(addition)
    if anchor is None:
        hint = "walking back is read off every run" if addition.startswith("walk") else "use '+ anchor'"
        raise ValueError(f"candidates: {name!r}: {addition!r} is unknown behind a plus: {hint}")
    options = {} if anchor["strength"] is None else {"strength": float(anchor["strength"])}
    return lambda module: [CallbackSpec(PretrainedAnchor, options)]


def _lora(found: re.Match[str], name: str, always_train: tuple[str, ...], exclude: tuple[str, ...], seed: int) -> Specs:
    options: dict[str, Any] = {"rank": int(found["rank"] or 16), "always_train": always_train}
    options |= {"exclude": exclude} if exclude else {}
    options |= {} if found["alpha"] is None else {"alpha": float(found["alpha"])}
    on = found["on"]
    if on is not None and (on.startswith("@") or "*" in on):
        options["include"] = check_patterns([part.strip() for part in on.split(",")], argument=f"candidates: {name!r}")
    elif on is not None:
        choice = _BUDGET.fullmatch(on)
        if choice is None or not _known(choice["what"]) or choice["what"] == "last_layers":
            raise ValueError(f"candidates: {name!r}: {on!r} is no criterion with a budget, such as 'kappa 0.25'")
        options |= {"criterion": choice["what"], "max_params": _number(choice["budget"]), "seed": seed}
    LoraAdapters(**options)  # which refuses what is out of range before any run
    return lambda module: [CallbackSpec(LoraAdapters, options)]


def _last_layers(
    module: pl.LightningModule, budget: int | float, always_train: Sequence[str], exclude: Sequence[str]
) -> CallbackSpec:
    always = match_parameters(module, always_train, argument="always_train")
    weights = [w for w in included(find_weights(module), module, ("*",), exclude) if w.name not in always]
    sizes = {
        weight.name: weight.parameter.numel()
        for weight in weights
        if weight.parameter is not None and weight.parameter.requires_grad
    }
    limit = budget if isinstance(budget, int) else int(budget * sum(sizes.values()))
    chosen: list[str] = []
    used = 0
    for name, size in reversed(sizes.items()):
        if size > limit:
            continue
        if used + size > limit:
            break
        chosen.append(name)
        used += size
    if not chosen:
        raise ValueError(f"last_layers: no matrix has at most {limit:,} parameters")
    return CallbackSpec(TrainOnly, {"include": tuple(sorted(chosen)), "always_train": tuple(always_train)})


def _known(what: str) -> bool:
    if what == "last_layers":
        return True
    try:
        criterion_of(what)
    except ValueError:
        return False
    return True


def _unknown(name: str) -> str:
    return (
        f"candidates: {name!r} is unknown: use full, matrices, a criterion with a budget ('kappa 0.25'), sensitivity, "
        "'sensitivity rates', a group or glob ('@gate_up'), 'last_layers 0.25', 'lora r16', 'lora r16 on kappa 0.25'; "
        "behind any of them '+ anchor'"
    )


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)
