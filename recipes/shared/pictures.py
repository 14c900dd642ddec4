"""Generated answers for TensorBoard: under their pictures, or as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from recipes.shared.encoding import Sample

_COLUMNS = 4


def answers_figure(samples: Sequence[Sample], answers: Sequence[str]) -> Figure:
    """Pictures under the answer that the model gave: green where it is right, else red above the right one in grey.

    Args:
        samples: each with an image.
        answers: what the model generated for them.
    """
    rows = -(-len(samples) // _COLUMNS)
    figure = Figure(figsize=(12, 2.7 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, sample, answer in zip(grid.flat, samples, answers, strict=False):
        assert sample.image is not None
        right = answer == sample.answer.strip()
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgrey")
        axes.imshow(np.asarray(sample.image.convert("RGB")))
        axes.set_title(_wrapped(answer or "(nothing)"), fontsize=8, color="green" if right else "red")
        if not right:
            axes.text(
                0.5, -0.02, _wrapped(sample.answer), transform=axes.transAxes, ha="center", va="top", fontsize=7,
                color="grey",
            )  # fmt: skip
    count = sum(answer == sample.answer.strip() for sample, answer in zip(samples, answers, strict=True))
    figure.suptitle(f"{count} of these {len(samples)} are right to the letter", fontsize=9)
    return figure


def answers_markdown(samples: Sequence[Sample], answers: Sequence[str]) -> str:
    """A table of prompts, generated answers and right ones."""
    rows = [
        f"| {_cell(sample.prompt)} | {_cell(answer)} | {_cell(sample.answer)} |"
        for sample, answer in zip(samples, answers, strict=True)
    ]
    return "\n".join(["| prompt | generated | right |", "|---|---|---|", *rows])


def _wrapped(text: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 120, placeholder=" …"), 40)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
