"""How names and counts are written, wherever they are shown."""

from __future__ import annotations

import unicodedata

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
