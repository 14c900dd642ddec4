import math
import re

import pytest
from rich.table import Table

from kappa_lightning.profile import KappaRow
from kappa_lightning.selection import rank
from kappa_lightning.tables import Group, figure_range, format_kappa, ranking_markdown, render, training_table


def row(name, kappa, shape=(4, 3), log_volume=1.0):
    return KappaRow(
        name=name, shape=shape, kappa=kappa, sigma_max=1.0, sigma_min=1.0 / kappa, log_volume=log_volume,
        frobenius_norm=1.0, rtol=0.0, kappas=None, sigma_maxs=None, log_volumes=None, frobenius_norms=None,
        matrix_shape=shape[-2:], experts="mean", dtype="float32", fingerprint="0" * 16,
    )  # fmt: skip


ROWS = [
    row("poor", 1234.5),
    row("zero", math.inf, log_volume=-math.inf),
    row("good", 1.5, (2, 3, 4), -12.34),
    row("fair", 20.0),
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ranking_lists_every_tensor_the_first_to_train_first():
    lines = ranking_markdown(rank(ROWS), ["good", "fair"]).splitlines()
    assert cells(lines[0]) == ["rank", "tensor", "shape", "κ", "log-volume (nats)", "trains"]
    assert [cells(line)[:4] for line in lines[2:]] == [
        ["1", "good", "2×3×4", "1.5"],
        ["2", "fair", "4×3", "20"],
        ["3", "poor", "4×3", "1,234"],
        ["4", "zero", "4×3", "∞"],
    ]
    assert [cells(line)[5] for line in lines[2:]] == ["yes", "yes", "", ""]
    assert cells(lines[2])[4] == "-12.3"


def test_ranking_is_a_markdown_table_with_as_many_cells_in_each_line():
    lines = ranking_markdown(ROWS, []).splitlines()
    assert {line.count("|") for line in lines} == {7}
    assert re.fullmatch(r"(\|:?-+:?)+\|", lines[1])


def test_ranking_takes_the_selection_as_any_iterable():
    lines = ranking_markdown(ROWS, iter(["zero", "poor"])).splitlines()[2:]
    assert [cells(line)[5] for line in lines] == ["yes", "yes", "", ""]


@pytest.mark.parametrize(
    ("kappa", "text"),
    [
        (1.0, "1"),
        (1.23456, "1.235"),
        (34.7109, "34.71"),
        (999.4, "999.4"),
        (1000.0, "1,000"),
        (81821.7, "81,822"),
        (math.inf, "∞"),
    ],
)
def test_kappa_is_short(kappa, text):
    assert format_kappa(kappa) == text


@pytest.mark.parametrize(
    ("kappas", "text"),
    [((), ""), ((5.0,), "5"), ((20.0, 3.0, 7.0), "3 – 20"), ((math.inf, 2.0), "2 – ∞"), ((math.inf,) * 2, "∞")],
)
def test_range_is_from_the_smallest_to_the_largest(kappas, text):
    assert figure_range(kappas) == text


def test_group_sums_the_sizes_of_its_tensors_and_knows_their_figures():
    sizes = {"good": 24, "fair": 12, "bias": 5}
    group = Group.of("trains", (name for name in ("good", "fair")), sizes, {"good": 1.5, "fair": 20.0})
    assert group == Group("trains", 2, 36, (1.5, 20.0))
    assert Group.of("vectors", ["bias"], sizes) == Group("vectors", 1, 5, ())


def lines_of(table):
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip()]


def test_training_table_has_counts_shares_and_ranges():
    groups = [
        Group("trains", 2, 1_500, (2.0, 1500.0)),
        Group("nothing", 0, 0, ()),
        Group("frozen", 12, 8_500, (math.inf, 3.0)),
    ]
    table = training_table(groups, title="KappaFreezeCallback(top_p=0.2)")
    assert "KappaFreezeCallback(top_p=0.2)" in table
    assert "nothing" not in table
    rows = lines_of(table)
    assert ["trains", "2", "1,500", "15.0%", "2 – 1,500"] in rows
    assert ["frozen", "12", "8,500", "85.0%", "3 – ∞"] in rows


def test_training_table_without_kappas_has_no_column_for_them():
    lines = lines_of(training_table([Group("vectors", 3, 30, ())], title="t"))
    assert ["tensors", "parameters", "share"] in lines
    assert ["vectors", "3", "30", "100.0%"] in lines


def test_rendered_table_has_no_colors_and_no_trailing_blanks():
    table = Table()
    table.add_column("[bold]head[/bold]")
    table.add_row("cell")
    text = render(table)
    assert "\x1b" not in text
    assert text.startswith("\n")
    assert all(line == line.rstrip() for line in text.splitlines())
