"""How the commands are found: each is a module in ``commands/``."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from kappa_lightning.cli import commands
from kappa_lightning.cli.command import Command


def names() -> list[str]:
    """The commands' names, sorted, without importing them."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))


def load(name: str) -> Command:
    """Import the command of a name."""
    module = import_module(f"{commands.__name__}.{name.replace('-', '_')}")
    command: Command = module.COMMAND
    return command
