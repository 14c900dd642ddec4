"""The rows that an interrupted pass had finished, one JSON line each, so that the next one goes on from there."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from kappa_lightning.files import locked_elsewhere, write_text
from kappa_lightning.profile.file import checksum, encode, parse
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.profile.settings import ProfileSettings

_FORMAT = "kappa-lightning journal"
_SCHEMA_VERSION = 2


class Journal:
    """A file to which finished rows are appended, and which this process has for itself until it is closed.

    A row is taken over only for the same name and content (fingerprint) and if the pass has the same settings; with
    other settings the file is started anew. A line that was cut off by the interruption, or that does not fit its
    checksum, is dropped, and a file that has lost its first line is started anew.

    Of several processes each appends to a file of its own, with its rank behind the name, and knows the rows of all:
    the next pass may give the weights to other ranks, or to more or fewer of them.

    Args:
        path: the file of rank 0; its folder must exist.
        settings: what the rows are computed with.
        rank: the rank of this process.

    Raises:
        BlockingIOError: if another process is writing to the file.
        ValueError: if the file is there and is no journal.
    """

    def __init__(self, path: str | os.PathLike[str], settings: ProfileSettings, *, rank: int = 0) -> None:
        self._first = Path(path)
        self.path = Path(f"{self._first}.{rank}") if rank else self._first
        header = {"format": _FORMAT, "schema_version": _SCHEMA_VERSION, **settings.of_rows}
        # Of a journal that is there, the lock must be had before its rows are read.
        with contextlib.closing(_open_locked(self.path)) if self.path.exists() else contextlib.nullcontext():
            rows = [row for file in self._files() for row in _read(file, settings)]
            self._rows = {(row.name, row.fingerprint): row for row in rows}
            # Written anew, so that what is appended never continues a line that was cut off; and in one step, since
            # another process may be reading it.
            lines = [json.dumps(header), *map(_line, self._rows.values())]
            write_text(self.path, "\n".join(lines) + "\n")
            self._file = _open_locked(self.path)
        self._names = {name for name, _ in self._rows}

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name was finished, whatever its content was."""
        return name in self._names

    def find(self, name: str, fingerprint: str) -> KappaRow | None:
        """The finished row of a tensor with this content."""
        return self._rows.get((name, fingerprint))

    def append(self, row: KappaRow) -> None:
        """Keep a finished row."""
        self._file.write(_line(row) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Delete the files of all processes, when the profile is complete and safe."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        ranked = glob.glob(f"{glob.escape(str(self._first))}.[0-9]*")
        return [Path(name) for name in [str(self._first), *sorted(ranked)] if os.path.exists(name)]


def _open_locked(path: Path) -> TextIO:
    file = path.open("a", encoding="utf-8")
    if locked_elsewhere(file.fileno()):
        file.close()
        raise BlockingIOError(
            f"another process is profiling to the same file, since it writes to {path}: wait until it has finished, or "
            "name another file"
        )
    return file


def _line(row: KappaRow) -> str:
    entry = encode(row.to_dict())
    return json.dumps({"row": entry, "checksum": checksum(entry)})


def _read(file: Path, settings: ProfileSettings) -> Iterator[KappaRow]:
    """The sound rows of a journal, if it was kept with these settings."""
    first, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    header = _parsed(first)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        if _has_lost_its_header(first, header):
            return
        raise ValueError(f"{file} is no journal of an interrupted profile: delete it or name another file")
    # Version 0.1.0 wrote no version, and rows without a checksum.
    schema = header.get("schema_version", 1)
    kept_with = {key: value for key, value in header.items() if key not in ("format", "schema_version")}
    if schema not in (1, _SCHEMA_VERSION) or kept_with != settings.of_rows:
        return
    for line in lines:
        entry = _parsed(line)
        if schema == _SCHEMA_VERSION:
            whole = isinstance(entry, dict) and entry.get("checksum") == checksum(entry.get("row"))
            entry = entry["row"] if whole else None
        with contextlib.suppress(ValueError):  # damaged, or the line at which the interruption came
            row = KappaRow.from_dict(entry)
            if row.experts == settings.combine:
                yield row


def _parsed(line: str) -> Any:
    try:
        return parse(line)
    except ValueError:
        return None


def _has_lost_its_header(first: str, parsed: Any) -> bool:
    """Whether a first line is a row, nothing (also as a file system leaves it after a power failure), or cut off."""
    is_row = isinstance(parsed, dict) and ("fingerprint" in parsed or parsed.keys() == {"row", "checksum"})
    beginning = json.dumps({"format": _FORMAT})[:-1]
    return is_row or not first.strip("\0 ") or beginning.startswith(first) or first.startswith(beginning)
