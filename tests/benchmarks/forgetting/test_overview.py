import math

import pytest
from matplotlib.image import imread

from benchmarks.forgetting.overview import METHODS, PANELS, comparison_of, lost, main, overview
from benchmarks.forgetting.page import lost as lost_of
from benchmarks.forgetting.page import values_of


def of_text(reading):
    """The nats, negated, without the small task."""
    return sum(math.log(reading.retention[name]) for name in ("own", "wikitext")) / 2


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_rows_are_the_means_of_the_page(panel):
    found = comparison_of(panel)
    rows = lost(panel, found)
    assert set(rows) == set(panel.methods) <= set(METHODS)
    for row, method in panel.methods.items():
        interval, arrived = rows[row]
        values = values_of(found, method, of_text if panel.name == "sight" else lost_of).values()
        known = [-value for value in values if value is not None]
        assert arrived == (len(known) == len(values))
        assert interval.mean == pytest.approx(sum(known) / len(known))


def test_picture_has_a_panel_for_each_task_and_is_written(tmp_path):
    axes = overview().axes
    assert [each.get_title() for each in axes] == [panel.title for panel in PANELS]
    assert main([str(tmp_path / "evidence.png")]) == 0
    assert imread(tmp_path / "evidence.png").shape[1] > 1000
