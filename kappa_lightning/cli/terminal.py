"""What reaches the terminal: any stream, any encoding, any width, and nothing that a name from a file slips in."""

from __future__ import annotations

import io
import os
import sys
import unicodedata

from rich.console import Console, RenderableType

from kappa_lightning.text import printable

__all__ = ["discard_output", "prepare_streams", "print_table", "printable", "say"]

# For terminals that cannot show them.
_PLAIN = str.maketrans({"κ": "kappa", "∞": "inf", "×": "x", "–": "-", "…": "...", "−": "-", "σ": "sigma"})


def prepare_streams() -> None:
    """Make sure that output cannot fail for its encoding, nor because a stream was closed before the start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # At once, or the next file that is opened gets this stream's number.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Give up what is not written yet: its reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print to standard output, in ASCII where the stream has no more."""
    sys.stdout.write(_encodable(text) + "\n")
    sys.stdout.flush()


def print_table(table: RenderableType, *, least_width: int) -> None:
    """Print a table of rich as wide as the terminal; into a file or a pipe, as wide as it wants to be.

    Args:
        table: what is printed.
        least_width: of a terminal that is narrower than this, the lines wrap, and not the words in the columns.
    """
    console = Console(emoji=False, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    console.width = max(console.width, least_width)
    # Not by the console itself, which ends the process when the pipe is closed.
    with console.capture() as text:
        console.print(table)
    say("\n".join(line.rstrip() for line in text.get().splitlines()))


def _encodable(text: str) -> str:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return unicodedata.normalize("NFC", text).translate(_PLAIN)
    return text
