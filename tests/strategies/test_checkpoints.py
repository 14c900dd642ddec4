"""A run that goes on under another strategy, or another form of checkpoint, is the run that was not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import RankFailed, on_ranks
from script import STRATEGIES, Net, adapt


def begin(name: str, root: Path, distributed: bool) -> str:
    """The first of two epochs, and a checkpoint of it."""
    saves = ModelCheckpoint(root, filename="first")
    adapt(name, root, saves, strategy=_strategy(name, distributed), max_epochs=1)
    return saves.best_model_path


def go_on(name: str, root: Path, path: str, distributed: bool) -> dict[str, Any]:
    """The second epoch."""
    return adapt(name, root, strategy=_strategy(name, distributed), ckpt_path=path)


def _strategy(name: str, distributed: bool) -> Any:
    if name != "fsdp2":
        return None
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(adapt, "one", tmp_path_factory.mktemp("one"), ranks=1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "distributed"),
    [
        ("one", "ddp", False),
        ("ddp", "one", False),
        ("ddp", "ddp", False),
        ("fsdp2", "fsdp2", True),
        ("fsdp2", "fsdp2", False),
        ("fsdp2", "one", False),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: dict[str, Any], first: str, second: str, distributed: bool
) -> None:
    path = on_ranks(begin, first, tmp_path, distributed, ranks=STRATEGIES[first][0])[0]
    assert Path(path).is_dir() == distributed
    for result in on_ranks(go_on, second, tmp_path, path, distributed, ranks=STRATEGIES[second][0]):
        for key in ("trained", "frozen", "profile", "moved", "requires_grad", "steps"):
            assert result[key] == uninterrupted[key], key
        for records in ("kappa", "retention"):
            assert [record["step"] for record in result[records]] == [0, 3, 6]
        for record, expected in zip(result["retention"], uninterrupted["retention"], strict=True):
            assert record == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(result["weights"], uninterrupted["weights"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result["optimizer"], uninterrupted["optimizer"], rtol=1e-7, atol=1e-12)


def test_checkpoint_whose_optimizer_states_cannot_be_assigned_is_refused(tmp_path: Path) -> None:
    path = on_ranks(begin, "one", tmp_path, False, ranks=1)[0]
    with pytest.raises(RankFailed, match="saved by another strategy, whose optimizer states are numbered"):
        on_ranks(go_on, "fsdp2", tmp_path, path, False)


class Reversed(Net):
    """Gives its optimizer the parameters in the opposite order."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.Adam([*module.parameters()][::-1], lr=0.02))


def begin_reversed(name: str, root: Path, distributed: bool, path: str | None) -> dict[str, Any]:
    saves = ModelCheckpoint(root, filename="first")
    strategy, epochs = _strategy(name, distributed), 1 if path is None else 2
    result = adapt(name, root, saves, strategy=strategy, module=Reversed(), ckpt_path=path, max_epochs=epochs)
    return result | {"path": saves.best_model_path}


@pytest.mark.slow
def test_states_of_an_optimizer_in_another_order_go_to_their_parameters_or_are_refused(tmp_path: Path) -> None:
    """A single file of FSDP2 sorts them by the module; loading goes by the optimizer."""
    (whole,) = on_ranks(adapt, "one", tmp_path, ranks=1)
    for distributed in (True, False):
        path = on_ranks(begin_reversed, "fsdp2", tmp_path / str(distributed), distributed, None)[0]["path"]
        resumed = on_ranks(begin_reversed, "fsdp2", tmp_path, distributed, path)[0]
        torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=1e-9, atol=1e-12)
    with pytest.raises(RankFailed, match=r"in the order of module\.parameters\(\)"):
        on_ranks(begin_reversed, "one", tmp_path, False, path, ranks=1)
