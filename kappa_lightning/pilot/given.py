"""What a user's functions give to a pilot: the module, the data and the probes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

from kappa_lightning.probes import Probe

Probes = Mapping[str, Probe] | Callable[[pl.LightningModule], Mapping[str, Probe]]


def probes_of(given: Probes, module: pl.LightningModule) -> Mapping[str, Probe]:
    """The probes by name.

    Raises:
        TypeError: if they are something else, or there are none.
    """
    probes = given(module) if callable(given) else given
    if not isinstance(probes, Mapping) or not probes or not all(isinstance(p, Probe) for p in probes.values()):
        kind = type(probes).__name__
        if isinstance(probes, Mapping):
            kind += " of " + (", ".join(sorted({type(p).__name__ for p in probes.values()})) or "nothing")
        raise TypeError(
            f"probes {'gave' if callable(given) else 'is'} a {kind}: it must be a dict of at least one name to a "
            "Probe, such as AccuracyProbe, or a function from the module to that"
        )
    return probes


def made_by(make: Callable[..., Any], seed: int, kind: Any, argument: str) -> Any:
    """What a user's function gives, which gets the seed if it has a parameter of that name."""
    made = make(seed=seed) if "seed" in inspect.signature(make).parameters else make()
    if not isinstance(made, kind):
        wanted = "a LightningModule" if argument == "make_module" else "a LightningDataModule or (train, val) loaders"
        raise TypeError(f"{argument} gave a {type(made).__name__}: it must return {wanted}")
    if isinstance(made, tuple | list) and len(made) != 2:
        raise TypeError(
            f"{argument} gave {len(made)} dataloaders: it must return two, one to train with and one to validate with "
            "(a list of them where there are several), or a LightningDataModule"
        )
    return made
