"""Pictures of coloured shapes drawn with Pillow, and what there is to say about them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

CELL = 16
"""Every shape is in a cell of this width and height, in pixels."""

CORNER = 2 * CELL
"""Width and height of a corner, four cells, in pixels."""

SIZE = 2 * CORNER
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
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("once", "twice", "thrice")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

Kind = tuple[str, str]
KINDS: list[Kind] = list(product(COLOURS, SHAPES))
"""Every colour with every shape."""

DESCRIBE = "describe the picture"
NAME = "what is it"


@dataclass(frozen=True, slots=True)
class Group:
    """Equal shapes in one corner: how many, of which colour and form."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} {COUNTS[self.count - 1]}"


@dataclass(frozen=True, slots=True)
class Picture:
    """What is in each corner, in the order of :data:`CORNERS`.

    Attributes:
        corners: four groups, ``None`` for an empty corner.
    """

    corners: tuple[Group | None, ...]

    @property
    def caption(self) -> str:
        """The one right description.

        Example:
            >>> Picture((None, Group(2, "red", "circle"), Group(1, "blue", "cross"), None)).caption
            'top right red circle twice bottom left blue cross once'
        """
        return " ".join(f"{place} {group}" for place, group in zip(CORNERS, self.corners, strict=True) if group)

    @property
    def names(self) -> str:
        """What is there, without the corners.

        Example:
            >>> Picture((None, Group(2, "red", "circle"), Group(1, "blue", "cross"), None)).names
            'red circle twice blue cross once'
        """
        return " ".join(str(group) for group in self.corners if group)

    @property
    def labels(self) -> list[tuple[int, int, int]]:
        """For each corner the colour, the form and the count of what it holds, each from 1; zeros for nothing."""
        colours = list(COLOURS)
        return [
            (1 + colours.index(group.colour), 1 + SHAPES.index(group.shape), group.count) if group else (0, 0, 0)
            for group in self.corners
        ]

    def draw(self, rng: random.Random) -> Image.Image:
        """An image of it, with sizes and places that vary; a group fills the cells of its corner in their order."""
        image = Image.new("RGB", (SIZE * _FINE, SIZE * _FINE), "white")
        pen = ImageDraw.Draw(image)
        for corner, group in enumerate(self.corners):
            if group is None:
                continue
            for cell in range(group.count):
                _draw(pen, group, corner % 2 * 2 + cell % 2, corner // 2 * 2 + cell // 2, rng)
        return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def random_single(rng: random.Random) -> Picture:
    """One group of any kind in any corner."""
    corners: list[Group | None] = [None] * 4
    corners[rng.randrange(4)] = _random_group(rng, rng.choice(KINDS))
    return Picture(tuple(corners))


def random_clutter(rng: random.Random) -> Picture:
    """Anything in any corner, a third of them empty: what eyes learn on."""
    return Picture(tuple(_random_group(rng, rng.choice(KINDS)) if rng.random() < 2 / 3 else None for _ in CORNERS))


def random_scene(rng: random.Random, *, unseen: bool) -> Picture:
    """Two groups whose combination of colours and forms is one that is kept for the test, or any other one."""
    corners: list[Group | None] = [None] * 4
    for corner, kind in zip(sorted(rng.sample(range(4), 2)), rng.choice(_COMBINATIONS[unseen]), strict=True):
        corners[corner] = _random_group(rng, kind)
    return Picture(tuple(corners))


def words() -> list[str]:
    """Texts with every word that captions and questions use."""
    groups = [str(Group(count, colour, shape)) for count in (1, 2, 3) for colour, shape in KINDS]
    return [*groups, *CORNERS, DESCRIBE, NAME]


def _random_group(rng: random.Random, kind: Kind) -> Group:
    return Group(rng.randint(1, len(COUNTS)), *kind)


def _split_combinations() -> dict[bool, list[tuple[Kind, Kind]]]:
    pairs = [(one, other) for one in KINDS for other in KINDS if one != other]
    random.Random(0).shuffle(pairs)
    # A pair and its mirror image are kept together, so that neither order of an unseen one was seen.
    unseen = {frozenset(pair) for pair in pairs[: len(pairs) // 20]}
    return {known: [pair for pair in pairs if (frozenset(pair) in unseen) is known] for known in (True, False)}


_COMBINATIONS = _split_combinations()
"""Ordered pairs of (colour, form): about a tenth of them under ``True``, of which no picture is learned from."""


def _draw(pen: ImageDraw.ImageDraw, group: Group, column: int, row: int, rng: random.Random) -> None:
    x, y = (((cell + 0.5) * CELL + rng.uniform(-1.5, 1.5)) * _FINE for cell in (column, row))
    r, fill = rng.uniform(4.5, 6.5) * _FINE, COLOURS[group.colour]
    if group.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif group.shape == "square":
        half = 0.86 * r
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif group.shape == "triangle":
        thirds = (0.0, math.tau / 3, 2 * math.tau / 3)
        pen.polygon([(x + 1.1 * r * math.sin(a), y - 1.1 * r * math.cos(a)) for a in thirds], fill=fill)
    else:
        bar = 0.33 * r
        pen.rectangle((x - bar, y - r, x + bar, y + r), fill=fill)
        pen.rectangle((x - r, y - bar, x + r, y + bar), fill=fill)
