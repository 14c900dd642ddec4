"""The JSON of a profile's file: versioned, with a checksum, strict JSON even where κ is infinite."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection
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
    write_document(path, FORMAT, SCHEMA_VERSION, profile)


def read_profile_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a profile's plain dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or damaged, is no profile, or comes from a newer version of this package.
    """
    document = read_document(
        path, FORMAT, SCHEMA_VERSION, kind="profile", again="profile again", unchecked=(_WITHOUT_CHECKSUM,)
    )
    missing = {"rows", "solver", "rtol", "experts"} - document.keys()
    if missing:
        raise ValueError(f"{path} is a damaged profile without {', '.join(sorted(missing))}: profile again")
    return document


def write_document(path: str | os.PathLike[str], format: str, schema_version: int, content: dict[str, Any]) -> None:
    """Write plain data as a JSON document that says what it is and has a checksum, atomically."""
    document = encode(
        {
            "format": format,
            "schema_version": schema_version,
            "versions": {"kappa_lightning": __version__, "torch": torch.__version__},
            **content,
        }
    )
    document = {**document, "checksum": checksum(document)}
    write_text(path, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_document(
    path: str | os.PathLike[str],
    format: str,
    schema_version: int,
    *,
    kind: str,
    again: str,
    unchecked: Collection[int] = (),
) -> dict[str, Any]:
    """Read what :func:`write_document` wrote, without its checksum.

    Args:
        path: the file.
        format: what it must say that it is.
        schema_version: the one that is read.
        kind: what it is, in the words of an error.
        again: how to make it anew, in the words of an error.
        unchecked: earlier schema versions that are read, too, and had no checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if the file is truncated or damaged, is something else, or comes from another version.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file of the {kind}")
    try:
        document = parse(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no {kind} or a truncated one ({error}): delete it and {again}") from error
    if not isinstance(document, dict) or document.get("format") != format:
        raise ValueError(f"{path} is JSON but no {kind} of kappa-lightning: it lacks the entry format={format!r}")
    schema = document.get("schema_version")
    if schema != schema_version and schema not in unchecked:
        raise ValueError(
            f"{path} has schema version {schema}, and this version of kappa-lightning reads {schema_version}: "
            f"update the package, or {again}"
        )
    given = document.pop("checksum", None)
    if schema == schema_version and given != checksum(document):
        raise ValueError(
            f"{path} is a damaged {kind}: its content does not fit its checksum, so it was changed after it was "
            f"written; {again}"
        )
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
