"""The command ``kappa-lightning``: each file in ``commands/`` is one of its commands, named like the file."""

from kappa_lightning.cli.entry import main

__all__ = ["main"]
