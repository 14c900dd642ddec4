import pytest
from outside import Plain, number_loaders, number_probe
from strategies.ranks import on_ranks

from kappa_lightning.pilot import pilot
from kappa_lightning.pilot.journal import Journal


def asked(folder, candidates):
    result = pilot(
        Plain, number_loaders, number_probe, candidates, folder=folder, steps=6, evaluations=1, race_seeds=0,
        confirm_seeds=1, finalists=2, level=1.05, progress=False,
        trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
    )  # fmt: skip
    entries = [(entry.label, entry.retention, entry.factor, entry.stage) for entry in result.entries]
    return entries, result.level, result.runs


@pytest.mark.slow
def test_pilot_under_ddp_is_the_same_on_every_rank_and_keeps_each_run_once(tmp_path):
    first, second = on_ranks(asked, tmp_path, ["full", "last_layers 0.9"], timeout=240)
    assert repr(first) == repr(second)  # NaN is not itself
    entries, _, runs = first
    assert {label for label, *_ in entries} >= {"full", "last_layers 0.9"}
    assert len(list(Journal(tmp_path, Journal.settings_of(tmp_path / "settings.json")).runs())) == runs
