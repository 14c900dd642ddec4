"""The JSON file of a sensitivity profile: versioned, with a checksum, written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from kappa_lightning.files import write_text
from kappa_lightning.profile.file import checksum, parse
from kappa_lightning.version import __version__

FORMAT = "kappa-lightning sensitivity profile"
SCHEMA_VERSION = 1


def write_sensitivity_file(path: str | os.PathLike[str], profile: dict[str, Any]) -> None:
    """Write a profile's plain dictionary to a file, atomically."""
    document = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "versions": {"kappa_lightning": __version__, "torch": torch.__version__},
        **profile,
    }
    document = {**document, "checksum": checksum(document)}
    write_text(path, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_sensitivity_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a profile's plain dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, was changed, is no such profile, or comes from another version.
    """
    again = "measure it again"
    try:
        document = parse(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no profile or a truncated one ({error}): delete it and {again}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is JSON but no sensitivity profile: it lacks the entry format={FORMAT!r}")
    schema = document.get("schema_version")
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {schema}, and this version of kappa-lightning reads {SCHEMA_VERSION}: update "
            f"the package, or {again}"
        )
    given = document.pop("checksum", None)
    if given != checksum(document) or not {"settings", "rows"} <= document.keys():
        raise ValueError(f"{path} was changed or damaged since it was written (its checksum differs): {again}")
    return document
