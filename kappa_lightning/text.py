"""How names and counts are written, wherever they are shown."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

# Control and format characters, lone surrogates, and separators of lines and paragraphs.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(name: str) -> str:
    """A name from a file on one line, with what would move the cursor or turn the direction of writing escaped.

    Example:
        >>> printable("größe κ.weight"), printable("a\\nb\\x1b[2J\\u202e")
        ('größe κ.weight', 'a\\\\nb\\\\x1b[2J\\\\u202e')
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in _UNSAFE else letter
        for letter in name
    )


def counted(number: int, noun: str) -> str:
    """A number and what it counts, such as ``1 tensor`` and ``1,200 tensors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def near_names(name: object, names: Iterable[str]) -> str:
    """What to add to an error about a name that is not there: the nearest of those that are.

    Example:
        >>> near_names("fc.weight", ["embedding", "net.fc.weight"])
        '; near names: net.fc.weight'
        >>> near_names("x", ["conv.weight", "net.fc.weight"])
        '; the names are like conv.weight, net.fc.weight'
    """
    known = [str(each) for each in names]
    wanted = str(name)
    near = [each for each in known if each.endswith(f".{wanted}") or wanted.endswith(f".{each}")]
    near += [each for each in difflib.get_close_matches(wanted, known) if each not in near]
    if near:
        return f"; near names: {', '.join(map(printable, near[:3]))}"
    return f"; the names are like {', '.join(map(printable, known[:3]))}" if known else "; there are none"
