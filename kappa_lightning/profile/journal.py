"""The rows that an interrupted pass had finished, one JSON line each, so that the next one goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kappa_lightning.profile.file import encode
from kappa_lightning.profile.row import KappaRow


class Journal:
    """A file to which finished rows are appended.

    A row is taken over only for the same name and content (fingerprint) and if the pass has the same settings; with
    other settings the file is started anew. A line that was cut off by the interruption is dropped.

    Args:
        path: the file; its folder must exist.
        settings: what the rows depend on, such as solver and rtol.

    Raises:
        ValueError: if the file is there and is no journal.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        header = {"format": "kappa-lightning journal", **settings}
        self._rows: dict[tuple[str, str], KappaRow] = {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        if lines and '"kappa-lightning journal"' not in lines[0]:
            raise ValueError(f"{self.path} is no journal of an interrupted profile: delete it or name another file")
        same = bool(lines) and lines[0] == json.dumps(header)
        for line in lines[1:] if same else []:
            try:
                row = KappaRow.from_dict(json.loads(line))
            except ValueError:
                break  # the line at which the interruption came
            self._rows[row.name, row.fingerprint] = row
        # Written anew, so that what is appended never continues a line that was cut off.
        rows = [json.dumps(encode(row.to_dict())) for row in self._rows.values()]
        self.path.write_text("\n".join([json.dumps(header), *rows]) + "\n", encoding="utf-8")

    def find(self, name: str, fingerprint: str) -> KappaRow | None:
        """The finished row of a tensor with this content."""
        return self._rows.get((name, fingerprint))

    def append(self, row: KappaRow) -> None:
        """Keep a finished row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(encode(row.to_dict())) + "\n")

    def remove(self) -> None:
        """Delete the file, when the profile is complete and safe."""
        self.path.unlink(missing_ok=True)
