"""The JSON file of a profile: versioned, written atomically, strict JSON even where κ is infinite."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from kappa_lightning.files import write_text
from kappa_lightning.version import __version__

FORMAT = "kappa-lightning profile"
SCHEMA_VERSION = 2


def write_profile_file(path: str | os.PathLike[str], profile: dict[str, Any]) -> None:
    """Write a profile's plain dictionary to a file, atomically."""
    document = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "versions": {"kappa_lightning": __version__, "torch": torch.__version__},
        **profile,
    }
    write_text(path, json.dumps(encode(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_profile_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a profile's plain dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, is no profile, or comes from a newer version of this package.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no profile or a truncated one ({error}): delete it and profile again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is JSON but no profile of kappa-lightning: it lacks the entry format={FORMAT!r}")
    schema = document.get("schema_version")
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {schema}, and this version of kappa-lightning reads {SCHEMA_VERSION}: "
            "update the package, or profile again"
        )
    missing = {"rows", "solver", "rtol", "experts"} - document.keys()
    if missing:
        raise ValueError(f"{path} is a damaged profile without {', '.join(sorted(missing))}: profile again")
    return document


def encode(value: Any) -> Any:
    """Plain data with every infinite number as a string, which JSON and all of its readers take."""
    return _map(value, lambda leaf: str(leaf) if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def decode(number: Any) -> Any:
    """The inverse of :func:`encode` for one number; anything else is passed through."""
    return float(number) if number in ("inf", "-inf") else number


def _map(value: Any, leaf: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(entry, leaf) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map(entry, leaf) for entry in value]
    return leaf(value)
