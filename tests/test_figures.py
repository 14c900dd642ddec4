import io
import math
import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kappa_lightning.figures import drift_figure

PNG = b"\x89PNG\r\n\x1a\n"


def png(figure):
    """What a logger writes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def history_of(*epochs):
    return [{"epoch": epoch, "step": 10 * epoch, "kappa": kappas} for epoch, kappas in enumerate(epochs)]


def points(figure):
    (collection,) = figure.axes[0].collections
    return np.asarray(collection.get_offsets())


def curves(figure):
    """The drift lines, without the line at zero."""
    return figure.axes[1].lines[1:]


BASELINE = {f"layer.{index}.weight": 10.0 * (index + 1) for index in range(8)}
LATER = {name: kappa * 10 ** (0.1 * index) for index, (name, kappa) in enumerate(BASELINE.items())}


def test_scatter_has_a_point_for_each_tensor_before_and_now():
    figure = drift_figure(BASELINE, history_of(BASELINE, LATER))
    expected = np.column_stack([list(BASELINE.values()), list(LATER.values())])
    np.testing.assert_allclose(points(figure), expected)
    assert png(figure).startswith(PNG)


def test_curves_show_the_drift_in_decades_over_the_epochs():
    middle = {name: kappa * 10 for name, kappa in BASELINE.items()}
    figure = drift_figure(BASELINE, history_of(BASELINE, middle, LATER))
    assert len(curves(figure)) == 8
    for index, line in enumerate(curves(figure)):
        np.testing.assert_allclose(line.get_xdata(), [0, 1, 2])
        np.testing.assert_allclose(line.get_ydata(), [0.0, 1.0, 0.1 * index], atol=1e-12)


def test_only_the_tensors_that_drifted_furthest_are_named():
    figure = drift_figure(BASELINE, history_of(BASELINE, LATER))
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {f"layer.{index}.weight" for index in (3, 4, 5, 6, 7)}


def test_falling_kappa_counts_as_drift_too():
    later = {**BASELINE, "layer.0.weight": 1.0}
    named = drift_figure(BASELINE, history_of(BASELINE, later)).legends[0].get_texts()
    assert "layer.0.weight" in {text.get_text() for text in named}


def test_tensors_with_infinite_kappa_are_left_out():
    baseline = {**BASELINE, "dead": math.inf, "revived": math.inf, "killed": 5.0}
    now = {**LATER, "dead": math.inf, "revived": 7.0, "killed": math.inf}
    figure = drift_figure(baseline, history_of(baseline, now))
    assert len(points(figure)) == len(curves(figure)) == 8
    assert np.isfinite(points(figure)).all()
    assert figure.axes[0].get_title().startswith("8 tensors, epoch 1")
    assert png(figure).startswith(PNG)


def test_epoch_at_which_a_tensor_was_infinite_is_left_out_of_its_curve():
    figure = drift_figure({"a": 2.0}, history_of({"a": 2.0}, {"a": math.inf}, {"a": 20.0}))
    (line,) = curves(figure)
    np.testing.assert_allclose(line.get_xdata(), [0, 2])
    np.testing.assert_allclose(line.get_ydata(), [0, 1])


def test_all_infinite_gives_an_empty_picture():
    kappas = {"a": math.inf, "b": math.inf}
    figure = drift_figure(kappas, history_of(kappas, kappas))
    assert not figure.axes[0].collections
    assert png(figure).startswith(PNG)


@pytest.mark.parametrize("kappa", [1.0, 3.5, 1e15])
def test_one_tensor_at_one_time_can_be_drawn(kappa):
    figure = drift_figure({"a": kappa}, history_of({"a": kappa}))
    np.testing.assert_allclose(points(figure), [[kappa, kappa]])
    assert png(figure).startswith(PNG)


def test_tensor_that_joined_later_is_drawn_from_there():
    history = history_of({"a": 2.0}, {"a": 2.0, "b": 4.0})
    figure = drift_figure({"a": 2.0, "b": 4.0}, history)
    np.testing.assert_allclose(curves(figure)[1].get_xdata(), [1])
    assert png(figure).startswith(PNG)


def test_figure_is_not_attached_to_pyplot():
    # pyplot would keep every figure of a long run alive.
    before = pyplot.get_fignums()
    drift_figure(BASELINE, history_of(BASELINE, LATER))
    assert pyplot.get_fignums() == before
