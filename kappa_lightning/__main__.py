"""``python -m kappa_lightning``, the same as the command ``kappa-lightning``."""

import sys

from kappa_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
