"""Fills ``<!-- rooms -->`` with the rooms of the package and what each imports, read from the code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from arrows import arrows, read_tree, rooms  # noqa: E402

MARK = "<!-- rooms -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table in the place of the mark."""
    return markdown.replace(MARK, table()) if MARK in markdown else markdown


def table() -> str:
    """The rooms, those that import least first."""
    found = rooms(arrows(read_tree(ROOT, ["kappa_lightning"])), "kappa_lightning")
    placed: list[str] = []
    while waiting := sorted(found.keys() - placed):
        ready = [room for room in waiting if set(found[room]) <= set(placed)]
        if not ready:
            raise ValueError(f"the rooms {', '.join(waiting)} import each other in a circle")
        placed += ready
    lines = ["| room | what it is | imports |", "|---|---|---|"]
    for room in placed:
        others = ", ".join(f"`{other}`" for other in found[room]) or "–"
        lines.append(f"| `{room}` | {_first_line(room)} | {others} |")
    return "\n".join(lines)


def _first_line(room: str) -> str:
    folder = ROOT / "kappa_lightning" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0].replace("``", "`")
