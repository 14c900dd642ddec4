"""The JSON file of a sensitivity profile: versioned, with a checksum, written atomically."""

from __future__ import annotations

import os
from typing import Any

from kappa_lightning.profile.file import read_document, write_document

FORMAT = "kappa-lightning sensitivity profile"
SCHEMA_VERSION = 1
_AGAIN = "measure it again"


def write_sensitivity_file(path: str | os.PathLike[str], profile: dict[str, Any]) -> None:
    """Write a profile's plain dictionary to a file, atomically."""
    write_document(path, FORMAT, SCHEMA_VERSION, profile)


def read_sensitivity_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a profile's plain dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, was changed, is no such profile, or comes from another version.
    """
    document = read_document(path, FORMAT, SCHEMA_VERSION, kind="sensitivity profile", again=_AGAIN)
    missing = {"settings", "rows"} - document.keys()
    if missing:
        raise ValueError(f"{path} is a damaged sensitivity profile without {', '.join(sorted(missing))}: {_AGAIN}")
    return document
