"""Weights in a file that another process may be reading or writing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def save_state(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors so that whoever reads the file meanwhile sees a whole one or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    with open(handle, "wb") as stream:
        torch.save(dict(state), stream)
    os.replace(temporary, file)
