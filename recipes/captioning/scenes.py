"""Pictures of coloured shapes drawn with Pillow, and what there is to say about them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

CELL = 16
"""Every shape is in a cell of this width and height, in pixels."""

CELLS = 4
"""Cells in a row and in a column of a picture."""

SIZE = CELL * CELLS
"""Width and height of a picture, in pixels."""

_FINE = 4
"""Drawn this much larger and scaled down, so that edges are smooth."""

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 170),
    "black": (25, 25, 25),
}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = ("one", "two", "three")
HALVES = (("left", "right"), ("above", "below"))

Kind = tuple[str, str]
KINDS: list[Kind] = list(product(COLOURS, PLURALS))
"""Every colour with every shape."""

DESCRIBE = "describe the picture"
QUESTIONS = {"colour": "what colour is it", "shape": "what shape is it"}


@dataclass(frozen=True, slots=True)
class Group:
    """Equal shapes side by side: how many, of which colour and form."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{COUNTS[self.count - 1]} {self.colour} {PLURALS[self.shape] if self.count > 1 else self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Two groups, one in each half of the picture.

    Attributes:
        halves: how the picture is halved: ``("left", "right")`` or ``("above", "below")``.
        first: what is in the first half.
        second: what is in the second half.
    """

    halves: tuple[str, str]
    first: Group
    second: Group

    @property
    def caption(self) -> str:
        """The one right description.

        Example:
            >>> Scene(("left", "right"), Group(2, "red", "circle"), Group(1, "blue", "cross")).caption
            'left two red circles right one blue cross'
        """
        return f"{self.halves[0]} {self.first} {self.halves[1]} {self.second}"

    def draw(self, rng: random.Random) -> Image.Image:
        """A picture of it, with sizes and places that vary."""
        canvas = _Canvas()
        for group, places in zip((self.first, self.second), self._places(rng), strict=True):
            for across, along in places:
                column, row = (across, along) if self.halves == HALVES[0] else (along, across)
                canvas.add(group.shape, group.colour, column, row, rng)
        return canvas.picture()

    def _places(self, rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Cells of both groups; never such that the picture halved the other way would part them as well."""
        half, lines = CELLS // 2, range(CELLS)
        while True:
            first = rng.sample(list(product(range(half), lines)), self.first.count)
            second = rng.sample(list(product(range(half, CELLS), lines)), self.second.count)
            if {along < half for _, along in first} & {along < half for _, along in second}:
                return first, second


@dataclass(frozen=True, slots=True)
class Single:
    """One shape anywhere, about which there is a question: the old vision task."""

    colour: str
    shape: str
    question: str

    @property
    def answer(self) -> str:
        """The word that answers the question."""
        return self.colour if self.question == "colour" else self.shape

    def draw(self, rng: random.Random) -> Image.Image:
        """A picture of it, with a size and a place that vary."""
        canvas = _Canvas()
        canvas.add(self.shape, self.colour, rng.randrange(CELLS), rng.randrange(CELLS), rng)
        return canvas.picture()


@dataclass(frozen=True, slots=True)
class Clutter:
    """Shapes in some of the cells, without any order: what eyes learn on.

    Attributes:
        cells: row by row, the colour and the shape in each cell, or ``None``.
    """

    cells: tuple[Kind | None, ...]

    @property
    def labels(self) -> list[int]:
        """What is in each cell, row by row: 0 for nothing, and a number for each of the :data:`KINDS`."""
        return [0 if kind is None else 1 + KINDS.index(kind) for kind in self.cells]

    def draw(self, rng: random.Random) -> Image.Image:
        """A picture of it, with sizes and places that vary."""
        canvas = _Canvas()
        for number, kind in enumerate(self.cells):
            if kind is not None:
                canvas.add(kind[1], kind[0], number % CELLS, number // CELLS, rng)
        return canvas.picture()


def random_clutter(rng: random.Random) -> Clutter:
    """Half of the cells are empty."""
    return Clutter(tuple(rng.choice(KINDS) if rng.random() < 0.5 else None for _ in range(CELLS**2)))


def random_single(rng: random.Random) -> Single:
    """Any colour, any shape, either question."""
    return Single(rng.choice(list(COLOURS)), rng.choice(list(PLURALS)), rng.choice(list(QUESTIONS)))


def random_scene(rng: random.Random, *, unseen: bool) -> Scene:
    """A scene of a combination of two colours and two shapes that is kept for the test, or of any other one."""
    kinds = rng.choice(_COMBINATIONS[unseen])
    first, second = (Group(rng.randint(1, len(COUNTS)), colour, shape) for colour, shape in kinds)
    return Scene(rng.choice(HALVES), first, second)


def _split_combinations() -> dict[bool, list[tuple[Kind, Kind]]]:
    pairs = [(one, other) for one in KINDS for other in KINDS if one != other]
    random.Random(0).shuffle(pairs)
    # A pair and its mirror image are kept together, so that neither order of an unseen one was seen.
    unseen: set[frozenset[Kind]] = set()
    for one, other in pairs:
        if len(unseen) < len(pairs) // 20:
            unseen.add(frozenset((one, other)))
    return {known: [pair for pair in pairs if (frozenset(pair) in unseen) is known] for known in (True, False)}


_COMBINATIONS = _split_combinations()
"""Ordered pairs of (colour, shape): a tenth of them under ``True``, of which no picture is learned from."""


def words() -> list[str]:
    """Texts with every word that captions, questions and answers use."""
    groups = [str(Group(count, colour, shape)) for count in (1, 2, 3) for colour, shape in KINDS]
    return [*groups, *(word for halves in HALVES for word in halves), DESCRIBE, *QUESTIONS.values()]


class _Canvas:
    def __init__(self) -> None:
        self._image = Image.new("RGB", (SIZE * _FINE, SIZE * _FINE), "white")
        self._pen = ImageDraw.Draw(self._image)

    def add(self, shape: str, colour: str, column: int, row: int, rng: random.Random) -> None:
        """Draw a shape into a cell, its size and its exact place being random."""
        x, y = ((cell + 0.5) * CELL * _FINE + rng.uniform(-1.5, 1.5) * _FINE for cell in (column, row))
        r, fill = rng.uniform(4.5, 6.5) * _FINE, COLOURS[colour]
        if shape == "circle":
            self._pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "square":
            half = 0.86 * r
            self._pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        elif shape == "triangle":
            corners = [
                (x + 1.1 * r * math.sin(a), y - 1.1 * r * math.cos(a)) for a in (0, math.tau / 3, 2 * math.tau / 3)
            ]
            self._pen.polygon(corners, fill=fill)
        else:
            bar = 0.33 * r
            self._pen.rectangle((x - bar, y - r, x + bar, y + r), fill=fill)
            self._pen.rectangle((x - r, y - bar, x + r, y + bar), fill=fill)

    def picture(self) -> Image.Image:
        """The picture at its final size."""
        return self._image.resize((SIZE, SIZE), Image.Resampling.BOX)
