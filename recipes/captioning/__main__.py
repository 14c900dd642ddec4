"""Teach a vision-language model to describe new pictures, and compare what each method forgets.

python -m recipes.captioning                                  the comparison, with the offline default
python -m recipes.captioning --help
python -m recipes.captioning fit --config recipes/configs/captioning.yaml      one run by LightningCLI
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.captioning.cli import SUBCOMMANDS, lightning_cli
from recipes.captioning.compare import compare


def main(argv: Sequence[str] | None = None) -> None:
    """Hand over to LightningCLI if the first word is one of its subcommands, and else compare the methods."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        lightning_cli(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
