from pathlib import Path

import pytest

import benchmarks.forgetting
from benchmarks.forgetting import subsets_page
from benchmarks.forgetting.comparison import compare, looking_up
from benchmarks.forgetting.page import page_of
from benchmarks.forgetting.protocol import Protocol
from benchmarks.forgetting.table import read_runs

EVIDENCE = Path(benchmarks.forgetting.__file__).parent / "evidence"
FINISHED = sorted(file.stem.removesuffix("-runs") for file in EVIDENCE.glob("*-runs.csv"))


@pytest.mark.parametrize("name", FINISHED)
def test_everything_on_a_page_is_computed_from_its_runs(name):
    protocol = Protocol.read(EVIDENCE / f"{name}.toml")
    page = page_of(protocol, compare(protocol, looking_up(read_runs(EVIDENCE / f"{name}-runs.csv"))), name)
    assert page == (EVIDENCE / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_page_of_the_random_subsets_is_computed_from_its_csv():
    file = EVIDENCE / "digits_subsets.csv"
    assert subsets_page.page_of(subsets_page.read(file), file.stem) == file.with_suffix(".md").read_text("utf-8")


def test_there_are_pages_to_look_at():
    assert "digits" in FINISHED


@pytest.mark.parametrize("file", sorted(EVIDENCE.glob("*.toml")), ids=lambda file: file.stem)
def test_protocols_can_be_read_and_have_a_primary_contrast(file):
    assert Protocol.read(file).primary
