"""The text task that needs no file: three numbers in words, to be sorted; and small models that know the words."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement
from pathlib import Path

from recipes.shared.encoding import Sample
from recipes.shared.pretraining import Schooling
from recipes.shared.small_llama import small_llama, small_moe
from recipes.shared.world import NUMBERS

SORTING = "sorting"
"""The task that needs no file."""

LENGTH = 3
"""Numbers that are sorted at a time."""

SCHOOLING = Schooling(steps=300, facts=96, samples=0, lr=3e-3)


def sorting_samples() -> tuple[list[Sample], list[Sample]]:
    """Every order of every three numbers below ten, to learn from and to be tested on; no three are in both.

    Example:
        >>> learned, tested = sorting_samples()
        >>> len(learned) + len(tested)
        1000
    """
    groups = list(combinations_with_replacement(range(10), LENGTH))
    random.Random(0).shuffle(groups)
    held_out = set(groups[: len(groups) // 5])
    learned: list[Sample] = []
    tested: list[Sample] = []
    for number in range(10**LENGTH):
        digits = [number // 10**place % 10 for place in range(LENGTH)]
        prompt, answer = (" ".join(NUMBERS[d] for d in order) for order in (digits, sorted(digits)))
        chosen = tested if tuple(sorted(digits)) in held_out else learned
        chosen.append(Sample(f"sort {prompt} :", answer))
    return learned, tested


def small_sorter(cache: Path) -> Path:
    """The folder of a small Llama that knows the text world, and the words of the task."""
    return small_llama(cache, _words(), SCHOOLING)


def small_moe_sorter(cache: Path) -> Path:
    """The folder of a small mixture of experts that knows the text world, and the words of the task."""
    return small_moe(cache, _words(), SCHOOLING)


def _words() -> list[str]:
    texts = [f"{sample.prompt} {sample.answer}" for sample in sorting_samples()[0]]
    return sorted({word for text in texts for word in text.split()})
