"""What imports what in a tree of Python files, read from their source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx


@dataclass(frozen=True, slots=True)
class Arrow:
    """An import statement, or a call that imports by name.

    Attributes:
        importer: the module in which it stands.
        imported: the module that it names; of another project, as it is written.
        line: where.
        late: whether it is in a function and so only runs when that is called.
    """

    importer: str
    imported: str
    line: int
    late: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}{' in a function' if self.late else ''}"


def read_tree(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """The source of every module below some folders, by its dotted name; a package is named like its folder."""
    sources = {}
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            name = ".".join(parts)
            # So that a relative import in a package is resolved from the package itself.
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def arrows(sources: Mapping[str, str]) -> list[Arrow]:
    """All imports of all modules.

    Args:
        sources: as :func:`read_tree` gives them; ``a.b.__init__`` is the package ``a.b``.
    """
    known = {_plain(name) for name in sources}
    return [arrow for name, source in sources.items() for arrow in _of_module(name, source, known)]


def circles(found: Iterable[Arrow], known: Iterable[str]) -> list[list[str]]:
    """Modules that import each other in a circle, and folders that do so, in the tree at any depth.

    Two folders (or a folder and a module beside it) are in a circle if something in each imports something in the
    other, even where no single module is in one.

    Args:
        found: all arrows.
        known: the modules that belong to the tree.
    """
    modules = {_plain(name) for name in known}
    pairs = {(a.importer, a.imported) for a in found if a.imported in modules and a.imported != a.importer}
    levels: dict[str, networkx.DiGraph] = {"": networkx.DiGraph(pairs)}
    for importer, imported in pairs:
        # The two part ways at one level of the tree; there it is an arrow from sibling to sibling.
        left, right = importer.split("."), imported.split(".")
        depth = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        if depth is not None:
            level = ".".join(left[:depth]) + ".*"
            edge = (".".join(left[: depth + 1]), ".".join(right[: depth + 1]))
            levels.setdefault(level, networkx.DiGraph()).add_edge(*edge)
    rings = {
        tuple(sorted(ring))
        for graph in levels.values()
        for ring in networkx.strongly_connected_components(graph)
        if len(ring) > 1
    }
    return [list(ring) for ring in sorted(rings)]


def against_the_order(found: Iterable[Arrow], order: Iterable[str]) -> list[str]:
    """Arrows from a room to one that stands behind it, and rooms that the order does not have.

    Args:
        found: all arrows.
        order: names of rooms, each a module or a package with all that is in it; a room may import those before it.
            Of two names that fit a module the longer one counts, and a top's name (``a``) is its ``__init__`` alone.
            ``a.*`` stands for all that is in ``a`` and has no line of its own, each by itself.
    """
    places = {name: place for place, name in enumerate(order)}
    tops = {name.split(".")[0] for name in places}
    wrong = []
    for arrow in found:
        if arrow.importer.split(".")[0] not in tops:
            continue
        here = _place(arrow.importer, places)
        if here is None:
            wrong.append(f"{arrow.importer} is in no room of the order: say where it stands")
            continue
        if arrow.imported.split(".")[0] not in tops:
            continue
        there = _place(arrow.imported, places)
        if there is None:
            wrong.append(f"{arrow.imported} is in no room of the order: say where it stands")
        elif places[there] > places[here]:
            wrong.append(f"{arrow}, which stands behind it")
        elif here == there and here.endswith(".*"):
            parent = here.removesuffix("*")
            siblings = [name.removeprefix(parent).split(".")[0] for name in (arrow.importer, arrow.imported)]
            if siblings[0] != siblings[1]:
                wrong.append(f"{arrow}, which stands beside it")
    return sorted(set(wrong))


def rooms(found: Iterable[Arrow], package: str) -> dict[str, list[str]]:
    """For each room of a package, the other rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for arrow in found:
        left, right = arrow.importer.split("."), arrow.imported.split(".")
        if left[0] == package and len(left) > 1:
            imported = graph.setdefault(left[1], set())
            if right[0] == package and len(right) > 1 and right[1] != left[1]:
                imported.add(right[1])
                graph.setdefault(right[1], set())
    return {room: sorted(imported) for room, imported in sorted(graph.items())}


def _plain(name: str) -> str:
    return name.removesuffix(".__init__")


def _place(module: str, places: Mapping[str, int]) -> str | None:
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        prefix = ".".join(parts[:depth])
        # The top's own name is its __init__ alone, or no new room would ever be missing.
        if prefix in places and (depth > 1 or depth == len(parts)):
            return prefix
        if depth < len(parts) and f"{prefix}.*" in places:
            return f"{prefix}.*"
    return None


def _of_module(name: str, source: str, known: set[str]) -> Iterator[Arrow]:
    tree = ast.parse(source, filename=name)
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for imported in _imported(node, name, known):
            yield Arrow(_plain(name), imported, node.lineno, id(node) in late)  # type: ignore[attr-defined]


def _imported(node: ast.AST, name: str, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*name.split(".")[: -node.level], *filter(None, [node.module])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in known else base
    elif isinstance(node, ast.Call) and node.args and _name(node.func) in ("import_module", "__import__"):
        argument = node.args[0]
        yield argument.value if isinstance(argument, ast.Constant) else "?"


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
