"""What a command is."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One command of ``kappa-lightning``; a module in ``cli/commands/`` has one, as ``COMMAND``.

    Its name is the module's, with dashes for underscores: ``walk_back.py`` is ``kappa-lightning walk-back``.

    Attributes:
        summary: what it does, in one line without a full stop.
        description: the same in a few sentences, for its own ``--help``.
        example: a command line as a user types it, ``kappa-lightning`` included.
        add_arguments: declares the arguments.
        run: does the work and returns the exit status. An OSError, ValueError, TypeError, ImportError or lack of
            memory that it raises is printed as one line, with exit status 1.
        resumes: whether the same command line goes on where an interruption came, which is then said.
    """

    summary: str
    description: str
    example: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    resumes: Callable[[Namespace], bool] = lambda _: False
