import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kappa_lightning.figures import sensitivity_figure, signal_figure
from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow


def profile():
    rows = [
        SensitivityRow(f"layers.{layer}.{role}.weight", (4, 4), 1.0 + layer, 2.0 ** (role == "up"), 16)
        for layer in range(3)
        for role in ("up", "down")
    ]
    return SensitivityProfile([*rows, SensitivityRow("layers.1.aside.weight", (4, 4), 1.0, 0.0, 16)])


def png(figure):
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_cells_are_colored_by_squared_signal_per_sensitivity_and_parameter():
    figure = sensitivity_figure(profile(), ["layers.2.down.weight"], title="small")
    axes, bar = figure.axes
    assert png(figure).startswith(b"\x89PNG")
    grid = axes.images[0].get_array()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    row = grid[next(i for i, label in enumerate(labels) if "up" in label)]
    np.testing.assert_allclose(row, np.log10([b**2 / (2 * 16) for b in (1, 2, 3)]))
    assert np.isnan(np.ma.filled(grid[next(i for i, label in enumerate(labels) if "aside" in label)], np.nan)).all()
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[2, next(i for i, label in enumerate(labels) if "down" in label)]]
    assert "b²/(c·n)" in bar.get_ylabel()


def test_each_tensor_is_a_point_and_what_trains_is_filled():
    figure = signal_figure(profile(), ["layers.2.down.weight"])
    assert png(figure).startswith(b"\x89PNG")
    (axes,) = figure.axes
    points = np.concatenate([group.get_offsets() for group in axes.collections])
    assert len(points) == 6  # what the reference does not reach has no place on a logarithmic axis
    assert sorted(points[:, 1].tolist()) == pytest.approx(sorted([1 / 16, 2 / 16, 3 / 16] * 2))
    filled = [len(group.get_facecolors()) and (group.get_facecolors()[:, 3] > 0).sum() for group in axes.collections]
    assert sum(filled) == 1
    assert png(signal_figure(SensitivityProfile([]))).startswith(b"\x89PNG")


def test_legends_say_what_hollow_points_and_gray_lines_mean():
    figure = signal_figure(profile(), ["layers.2.down.weight"])
    of_roles, of_marks = figure.legends
    assert {line.get_marker() for line in of_roles.get_lines()} == {"s"}  # is neither filled nor hollow
    texts = [text.get_text() for text in of_marks.get_texts()]
    trains, frozen, line = of_marks.get_lines()
    assert texts == ["trains", "does not train", "equal b²/(c·n), more above"]
    assert frozen.get_markerfacecolor() == "none" != trains.get_markerfacecolor()
    assert line.get_linestyle() == "-"
