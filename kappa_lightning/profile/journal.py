"""The rows that an interrupted pass had finished, one JSON line each, so that the next one goes on from there."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from kappa_lightning.files import write_text
from kappa_lightning.profile.file import encode
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.profile.settings import ProfileSettings


class Journal:
    """A file to which finished rows are appended.

    A row is taken over only for the same name and content (fingerprint) and if the pass has the same settings; with
    other settings the file is started anew. A line that was cut off by the interruption is dropped.

    Of several processes each appends to a file of its own, with its rank behind the name, and knows the rows of all:
    the next pass may give the weights to other ranks, or to more or fewer of them.

    Args:
        path: the file of rank 0; its folder must exist.
        settings: what the rows are computed with.
        rank: the rank of this process.

    Raises:
        ValueError: if the file is there and is no journal.
    """

    def __init__(self, path: str | os.PathLike[str], settings: ProfileSettings, *, rank: int = 0) -> None:
        self._first = Path(path)
        self.path = Path(f"{self._first}.{rank}") if rank else self._first
        header = json.dumps({"format": "kappa-lightning journal", **settings.of_rows})
        rows = [row for file in self._files() for row in _read(file, header)]
        self._rows = {(row.name, row.fingerprint): row for row in rows}
        # Written anew, so that what is appended never continues a line that was cut off; and in one step, since
        # another process may be reading it.
        lines = [json.dumps(encode(row.to_dict())) for row in self._rows.values()]
        write_text(self.path, "\n".join([header, *lines]) + "\n")

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name was finished, whatever its content was."""
        return any(known == name for known, _ in self._rows)

    def find(self, name: str, fingerprint: str) -> KappaRow | None:
        """The finished row of a tensor with this content."""
        return self._rows.get((name, fingerprint))

    def append(self, row: KappaRow) -> None:
        """Keep a finished row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(encode(row.to_dict())) + "\n")

    def remove(self) -> None:
        """Delete the files of all processes, when the profile is complete and safe."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        ranked = glob.glob(f"{glob.escape(str(self._first))}.[0-9]*")
        return [Path(name) for name in [str(self._first), *sorted(ranked)] if os.path.exists(name)]


def _read(file: Path, header: str) -> Iterator[KappaRow]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines and '"kappa-lightning journal"' not in lines[0]:
        raise ValueError(f"{file} is no journal of an interrupted profile: delete it or name another file")
    for line in lines[1:] if lines and lines[0] == header else []:
        try:
            yield KappaRow.from_dict(json.loads(line))
        except ValueError:
            return  # the line at which the interruption came
