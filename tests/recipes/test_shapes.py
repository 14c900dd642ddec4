import random

import numpy as np
import pytest

from recipes.captioning.data import DrawnScenes
from recipes.shared.shapes import (
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
from recipes.shared.small_llava import draw_question


def groups_of(caption):
    """(color, form) of both groups of a caption."""
    tokens = caption.split()
    return [tuple(tokens[at + 2 : at + 4]) for at in (0, 5)]


@pytest.mark.parametrize("color", COLOURS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_picture_shows_the_count_and_the_color_in_the_corner_that_the_caption_names(color, count):
    for corner, place in enumerate(CORNERS):
        groups = [None] * 4
        groups[corner] = Group(count, color, "square")
        picture = Picture(tuple(groups))
        pixels = np.asarray(picture.draw(random.Random(corner))).astype(int)
        colored = np.abs(pixels - np.array(COLOURS[color])).sum(-1) < 30
        cells = colored.reshape(4, CELL, 4, CELL).any(axis=(1, 3))
        assert cells.sum() == count
        rows, columns = np.nonzero(cells)
        assert {CORNERS[row // 2 * 2 + column // 2] for row, column in zip(rows, columns, strict=True)} == {place}
        assert picture.caption.startswith(f"{place} {color} square {('once', 'twice', 'thrice')[count - 1]}")


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


def test_labels_of_a_corner_are_what_it_holds():
    picture = Picture((None, Group(2, "green", "cross"), None, Group(3, "red", "circle")))
    assert picture.labels == [(0, 0, 0), (2, 4, 2), (0, 0, 0), (1, 1, 3)]


def test_names_are_the_caption_without_the_corners():
    for seed in range(30):
        picture = random_single(random.Random(seed))
        assert sum(group is not None for group in picture.corners) == 1
        assert picture.caption.split(maxsplit=2)[2] == picture.names
    both = random_scene(random.Random(0), unseen=False)
    assert [word for word in both.caption.split() if word not in " ".join(CORNERS).split()] == both.names.split()
    assert any(None not in random_clutter(random.Random(seed)).corners for seed in range(50))


def test_old_vision_task_shows_no_combination_that_is_kept_for_the_test():
    unseen = {frozenset(groups_of(random_scene(random.Random(seed), unseen=True).caption)) for seed in range(4000)}
    shown = [draw_question(random.Random(seed)).answer.split() for seed in range(2000)]
    pairs = [frozenset([(w[0], w[1]), (w[3], w[4])]) for w in shown if len(w) == 6]
    assert len(pairs) > 1000
    assert not unseen.intersection(pairs)


def test_the_same_index_is_always_the_same_picture():
    one, other = (DrawnScenes(5, seed=3, unseen=True) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert first.answer == second.answer
        assert first.image.tobytes() == second.image.tobytes()
    assert len({sample.answer for sample in one}) > 1
    assert one[0].image.tobytes() != DrawnScenes(5, seed=4, unseen=True)[0].image.tobytes()
