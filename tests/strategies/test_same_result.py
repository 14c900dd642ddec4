"""The same script gives the same result, whichever strategy runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from script import STRATEGIES, Net, adapt
from tiny import numpy_ranking


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single process finds."""
    return on_ranks(adapt, "one", tmp_path_factory.mktemp("one"), ranks=1)[0]


@pytest.fixture(scope="module", params=[name for name in STRATEGIES if name != "one"])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several processes finds."""
    return on_ranks(adapt, request.param, tmp_path_factory.mktemp("many"), ranks=STRATEGIES[request.param][0])


def test_one_process_trains_the_tensors_of_lowest_kappa(one: dict[str, Any]) -> None:
    lowest = numpy_ranking(Net(), Net.MATRICES)[:2]
    assert sorted(one["trained"]) == sorted(lowest) == one["moved"]


def test_every_process_selects_what_one_process_selects(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for result in many:
        assert result["trained"] == one["trained"]
        assert result["frozen"] == one["frozen"]
        assert result["requires_grad"] == one["requires_grad"]


def test_profiles_agree_to_the_last_bit(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for result in many:
        assert result["profile"] == one["profile"]


def test_frozen_tensors_stay_and_the_others_train_alike(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for result in many:
        assert result["moved"] == one["moved"]
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-9, atol=1e-12)


def test_kappa_curves_are_equal(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for result in many:
        assert [record["step"] for record in result["kappa"]] == [0, 3, 6]
        for record, expected in zip(result["kappa"], one["kappa"], strict=True):
            assert record["kappa"] == pytest.approx(expected["kappa"], rel=1e-8)


def test_retention_curves_are_equal(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    """Each sample counts once, although 23 samples in batches of 5 do not divide by the processes."""
    for result in many:
        assert result["retention"] == many[0]["retention"]
        for record, expected in zip(result["retention"], one["retention"], strict=True):
            # torchmetrics adds up in float32.
            assert record == pytest.approx(expected, rel=1e-5)
