"""Weights in a file that another process may be reading or writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kappa_lightning.files import replacing


def save_state(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors so that whoever reads the file meanwhile sees a whole one or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save(dict(state), temporary)
