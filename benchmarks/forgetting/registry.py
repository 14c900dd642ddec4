"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.forgetting.captions import NewCaptions
from benchmarks.forgetting.digits import InvertedDigits
from benchmarks.forgetting.language import WordProblems
from benchmarks.forgetting.scenes import TwoDigitScenes
from benchmarks.forgetting.sight import Sight
from benchmarks.forgetting.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "digits": InvertedDigits,
    "scenes": TwoDigitScenes,
    "captions": NewCaptions,
    "language": WordProblems,
    "sight": Sight,
}
"""Each takes the options of a configuration as keyword arguments."""
