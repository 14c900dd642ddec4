"""Settings that every test shares."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kappa_lightning.profile.compute


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, whichever ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - Lightning and torchvision draw from the global generator
    torch.manual_seed(0)


@pytest.fixture
def lightning_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Lightning logs; its logger does not propagate, so pytest alone would not see it."""
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, tuple[int, ...]]]:
    """The device and the shape (count, rows, cols) of every batch of matrices that a profile decomposes."""
    seen: list[tuple[torch.device, tuple[int, ...]]] = []
    original = kappa_lightning.profile.compute.spectrum

    def spectrum(matrix: Tensor, **options: Any) -> Any:
        seen.append((matrix.device, tuple(matrix.shape)))
        return original(matrix, **options)

    monkeypatch.setattr(kappa_lightning.profile.compute, "spectrum", spectrum)
    return seen
