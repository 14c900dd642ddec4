import random

import numpy as np
import pytest

from recipes.captioning.data import DrawnScenes
from recipes.captioning.scenes import (
    CELL,
    COLOURS,
    CORNERS,
    SHAPES,
    Group,
    Picture,
    random_clutter,
    random_scene,
    random_single,
)


def groups_of(caption):
    """(colour, form) of both groups of a caption."""
    tokens = caption.split()
    return [tuple(tokens[at + 2 : at + 4]) for at in (0, 5)]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_picture_shows_the_count_and_the_colour_in_the_corner_that_the_caption_names(colour, count):
    for corner, place in enumerate(CORNERS):
        groups = [None] * 4
        groups[corner] = Group(count, colour, "square")
        picture = Picture(tuple(groups))
        pixels = np.asarray(picture.draw(random.Random(corner))).astype(int)
        coloured = np.abs(pixels - np.array(COLOURS[colour])).sum(-1) < 30
        cells = coloured.reshape(4, CELL, 4, CELL).any(axis=(1, 3))
        assert cells.sum() == count
        rows, columns = np.nonzero(cells)
        assert {CORNERS[row // 2 * 2 + column // 2] for row, column in zip(rows, columns, strict=True)} == {place}
        assert picture.caption.startswith(f"{place} {colour} square {('once', 'twice', 'thrice')[count - 1]}")


def test_forms_look_different():
    areas = {}
    for form in SHAPES:
        drawings = [
            np.asarray(Picture((Group(1, "black", form), None, None, None)).draw(random.Random(seed))) < 128
            for seed in range(20)
        ]
        areas[form] = np.mean([drawing.any(-1).sum() for drawing in drawings])
    assert len({round(area / 5) for area in areas.values()}) == len(SHAPES)


def test_no_combination_is_both_learned_and_tested_in_either_order():
    learned, tested = (
        {frozenset(groups_of(random_scene(random.Random(seed), unseen=unseen).caption)) for seed in range(4000)}
        for unseen in (False, True)
    )
    assert len(tested) > 20
    assert not learned & tested


def test_labels_of_a_cell_are_what_it_holds():
    picture = Picture((None, Group(2, "green", "cross"), None, None))
    labels = np.array(picture.labels).reshape(4, 4, 3)
    assert (labels[0, 2:] == (2, 4, 2)).all()
    assert labels.sum() == labels[0, 2:].sum()


def test_single_group_is_named_as_in_a_caption():
    for seed in range(30):
        picture, name = random_single(random.Random(seed))
        assert picture.caption.split(maxsplit=2)[2] == name
    assert any(None not in random_clutter(random.Random(seed)).corners for seed in range(50))


def test_the_same_index_is_always_the_same_picture():
    one, other = (DrawnScenes(5, seed=3, unseen=True) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert first.answer == second.answer
        assert first.image.tobytes() == second.image.tobytes()
    assert len({sample.answer for sample in one}) > 1
    assert one[0].image.tobytes() != DrawnScenes(5, seed=4, unseen=True)[0].image.tobytes()
