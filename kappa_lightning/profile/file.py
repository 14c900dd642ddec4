"""The JSON of a profile's file: versioned, with a checksum, strict JSON even where κ is infinite."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from kappa_lightning.files import write_text
from kappa_lightning.version import __version__

FORMAT = "kappa-lightning profile"
SCHEMA_VERSION = 3
# What version 0.1.0 wrote: the same without a checksum.
_WITHOUT_CHECKSUM = 2


def write_profile_file(path: str | os.PathLike[str], profile: dict[str, Any]) -> None:
    """Write a profile's plain dictionary to a file, atomically."""
    document = encode(
        {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "versions": {"kappa_lightning": __version__, "torch": torch.__version__},
            **profile,
        }
    )
    document = {**document, "checksum": checksum(document)}
    write_text(path, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_profile_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a profile's plain dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or damaged, is no profile, or comes from a newer version of this package.
    """
    try:
        document = parse(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no profile or a truncated one ({error}): delete it and profile again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is JSON but no profile of kappa-lightning: it lacks the entry format={FORMAT!r}")
    schema = document.get("schema_version")
    if schema not in (SCHEMA_VERSION, _WITHOUT_CHECKSUM):
        raise ValueError(
            f"{path} has schema version {schema}, and this version of kappa-lightning reads {SCHEMA_VERSION}: "
            "update the package, or profile again"
        )
    given = document.pop("checksum", None)
    if schema == SCHEMA_VERSION and given != checksum(document):
        raise ValueError(
            f"{path} is a damaged profile: its content does not fit its checksum, so it was changed after it was "
            "written; profile again"
        )
    missing = {"rows", "solver", "rtol", "experts"} - document.keys()
    if missing:
        raise ValueError(f"{path} is a damaged profile without {', '.join(sorted(missing))}: profile again")
    return document


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is none, or one that is too deep or holds too large a number to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def checksum(document: Any) -> str:
    """SHA-256 of what a document of plain data says, however it is laid out, as hexadecimal digits.

    Example:
        >>> checksum({"a": 1, "b": [2.5]}) == checksum({"b": [2.5], "a": 1}) != checksum({"a": 1, "b": [2.25]})
        True
    """
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def encode(value: Any) -> Any:
    """Plain data with every infinite number as a string, which JSON and all of its readers take."""
    if isinstance(value, dict):
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(number: Any) -> Any:
    """The inverse of :func:`encode` for one number; anything else is passed through."""
    return float(number) if number in ("inf", "-inf") else number
