"""How the curves of a run are looked at."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def tensorboard() -> str:
    """How to call the TensorBoard that is installed beside this Python, from where this was called."""
    script = Path(sys.executable).with_name("tensorboard")
    return os.path.relpath(script) if script.is_file() else "tensorboard"
