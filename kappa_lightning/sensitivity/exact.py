"""Forward passes in full float32, which are taken for how much they differ from each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kappa_lightning.spectra import full_precision_products


@contextmanager
def exact_passes(device: torch.device) -> Iterator[None]:
    """Take forward passes without autocast and TF32, within a context that asks for either.

    The difference between two passes whose weights differ by a small movement is otherwise mostly rounding: bfloat16
    has eight bits.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), exact_passes(x.device):
        ...     (x @ x).dtype
        torch.float32
    """
    with torch.autocast(device.type, enabled=False), full_precision_products(torch.float32):
        yield
