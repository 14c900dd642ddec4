"""The small models that recipes use where none is given, by their names."""

from __future__ import annotations

from pathlib import Path

from recipes.shared.small_llava import small_llava
from recipes.shared.sorting import small_moe_sorter, small_sorter

CACHE = Path(__file__).parents[2] / "runs" / "cache"
"""Where they are kept once they were trained."""

SMALL_LLAVA = "small-llava"
SMALL_LLAMA = "small-llama"
SMALL_MOE = "small-moe"


def is_small(model: str) -> bool:
    """Whether it is one of these."""
    return model in (SMALL_LLAVA, SMALL_LLAMA, SMALL_MOE)


def locate(model: str) -> str:
    """The folder of a small model, which is trained if it is not there yet; any other name as it is."""
    if model == SMALL_LLAVA:
        return str(small_llava(CACHE))
    if model == SMALL_LLAMA:
        return str(small_sorter(CACHE))
    if model == SMALL_MOE:
        return str(small_moe_sorter(CACHE))
    return model
