import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import benchmarks.forgetting.digits as digits
from benchmarks.forgetting.__main__ import main, parse
from benchmarks.forgetting.comparison import NotRunError, compare, looking_up
from benchmarks.forgetting.controls import depth_matched, first_within, method, permuted
from benchmarks.forgetting.digits import Digits, InvertedDigits
from benchmarks.forgetting.page import page_of
from benchmarks.forgetting.protocol import LINE, Protocol
from benchmarks.forgetting.table import read_runs, write_runs
from kappa_lightning import KappaProfile
from kappa_lightning.pilot.adaptation import Point
from kappa_lightning.pilot.trial import Run, Spec
from kappa_lightning.selection import rank

PROTOCOL = Protocol(
    task="digits", methods=("full", "kappa 0.25"), primary=(("kappa 0.25", "full"),), lr=1e-3, seeds=(0, 1, 2),
    tuning_seed=9, steps=10, evaluations=2, target=0.5, level_steps=(0, 2), climbs=1,
)  # fmt: skip


def execute(specs):
    """Full arrives from step 0 on and κ from step 2, but with seed 2 only one step later."""
    runs = []
    for spec in specs:
        slowest = (0 if spec.candidate == "full" else 2) + (spec.seed == 2)
        lowest = 2.0 if spec.step >= slowest else 3.0
        kept = round((0.9 if spec.candidate == "full" else 0.8) + 0.01 * spec.seed, 3)
        path = (Point(0, 4.0, {"a": 1.0}), Point(9, lowest, {"a": kept}))
        runs.append(Run(spec, path, path, {"a": 0.5}, 10, 20, 1.0))
    return runs


def test_protocol_is_run_as_it_is_written():
    asked = []

    def remembering(specs):
        asked.extend(specs)
        return execute(specs)

    found = compare(PROTOCOL, remembering)
    assert found.level == 3.0
    # At the level of 3 every run arrives, since that is where they all come.
    assert set(found.rates) == {"full", "kappa 0.25"}
    # Seed by seed, so that an interrupted comparison has whole pairs.
    reported = [(spec.seed, spec.candidate) for spec in asked if spec.seed != 9]
    assert reported == sorted(reported)
    assert {seed: outcome.arrived for seed, outcome in found.outcomes["full"].items()} == {0: True, 1: True, 2: True}


def test_seed_that_does_not_arrive_is_tried_at_faster_rates_and_then_is_an_outcome():
    protocol = replace(PROTOCOL, level=2.5, climbs=1)
    found = compare(protocol, execute)
    assert found.rates == {"full": 0, "kappa 0.25": 2}
    assert {seed: o.run.spec.step for seed, o in found.outcomes["kappa 0.25"].items()} == {0: 2, 1: 2, 2: 3}
    strict = compare(replace(protocol, climbs=0), execute)
    assert not strict.outcomes["kappa 0.25"][2].arrived
    page = page_of(replace(protocol, climbs=0), strict, "x")
    assert "| kappa 0.25 | 2/3 |" in page
    assert "| kappa 0.25 − full | 3, 1 without the first, 1 without the second | – | – |" in page


def test_page_and_runs_survive_their_file(tmp_path):
    made = []

    def keeping(specs):
        runs = execute(specs)
        made.extend(runs)
        return runs

    protocol = replace(PROTOCOL, level=2.5, secondary=(("full" + LINE, "full"),))
    found = compare(protocol, keeping)
    write_runs({run.spec: run for run in made}.values(), protocol, tmp_path / "runs.csv")
    again = compare(protocol, looking_up(read_runs(tmp_path / "runs.csv")))
    assert again == found
    page = page_of(protocol, again, "x")
    assert page == page_of(protocol, found, "x")
    # 0.9 − 0.8 at the end of the path, three quarters of it at the level: −0.075 with every seed.
    assert "| kappa 0.25 − full | 3 | -0.0750 [-0.0750, -0.0750] |" in page
    # Exact flips of three signs cannot get below 0.25, so the contrast is not in any family.
    assert "| 0.250 | – |" in page


def test_part_of_the_runs_is_reported_as_part():
    runs = [run for spec in (Spec("full", 0, 9), Spec("full", 2, 9), Spec("full", -2, 9)) for run in execute([spec])]
    found = compare(replace(PROTOCOL, level=2.5), looking_up(runs))
    assert found.outcomes == {}
    assert "search not finished" in page_of(PROTOCOL, found, "x")
    with pytest.raises(NotRunError):
        looking_up(runs)([Spec("kappa 0.25", 0, 0)])


def test_diverged_point_survives_its_file(tmp_path):
    run = Run(
        Spec("full", 0, 0), (Point(0, 4.0, {"a": 1.0}), Point(5, math.inf, {"a": 0.0})), (), {"a": 0.5}, 1, 2, 3.0
    )
    write_runs([run], PROTOCOL, tmp_path / "runs.csv")
    assert read_runs(tmp_path / "runs.csv") == [run]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chess"}, "task='chess' is unknown"),
        ({"seeds": (9,)}, "tuning_seed=9"),
        ({"seeds": ()}, "at least one entry"),
        ({"primary": (("kappa 0.25", "random"),)}, "names 'random'"),
        ({"methods": ("kappa 0.25",), "primary": ()}, "lack 'full'"),
        ({"target": 1.0}, "target=1.0"),
        ({"starts": {"x": 1}}, "starts names 'x'"),
    ],
)
def test_protocol_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PROTOCOL, **change)


# The controls


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 24), "down": nn.Linear(24, 6)}) for _ in range(4))
    return nn.ModuleDict({"stem": nn.Linear(2, 6), "blocks": blocks})


def test_budget_is_what_the_ranking_has_first_and_leftovers_are_left(net):
    ranking = rank(KappaProfile.from_model(net, progress=False), "kappa")
    sizes = {row.name: row.num_parameters for row in ranking}
    chosen = first_within(ranking, 0.5)
    assert chosen == [row.name for row in ranking][: len(chosen)]
    following = ranking[len(chosen)]
    assert sum(sizes[n] for n in chosen) + following.num_parameters > 0.5 * sum(sizes.values())


def test_permuted_has_as_many_of_each_kind_and_depth_matched_no_more_of_each_layer(net):
    ranking = rank(KappaProfile.from_model(net, progress=False), "kappa")
    chosen = first_within(ranking, 0.4)
    draws = [permuted(ranking, chosen, seed) for seed in range(8)]

    def count(names, kind):
        return sum(kind in name for name in names)

    assert all(count(draw, kind) == count(chosen, kind) for draw in draws for kind in ("up", "down", "stem"))
    assert len({tuple(sorted(draw)) for draw in draws}) > 1
    for seed in range(8):
        drawn = depth_matched(ranking, chosen, seed)
        assert all(count(drawn, f"blocks.{i}.") <= count(chosen, f"blocks.{i}.") for i in range(4))
    assert permuted(ranking, chosen, 3) == permuted(ranking, chosen, 3)


def test_methods_of_the_evidence_choose_anew_with_the_seed(tmp_path):
    task = InvertedDigits()
    module = digits.DigitReader(1e-3)
    first, same, other = (method("random 0.25", task, seed).build(module)[0].include for seed in (0, 0, 1))
    assert first == same != other
    *chosen, anchor = method("random 0.25 + light anchor 10", task, 0).build(module)
    assert [callback.include for callback in chosen] == [first]
    assert anchor.strength == 10
    (inside,) = method("reversed:kappa 0.5 in *.up.weight", task, 0).build(module)
    assert inside.include
    assert all(name.endswith("up.weight") for name in inside.include)
    with pytest.raises(ValueError, match="is unknown"):
        method("kapa 0.25", task, 0)


def test_digits_are_split_the_same_way_and_inverted():
    plain, inverted = Digits(3, inverted=False), Digits(3, inverted=True)
    for one, other in ((plain.learned, inverted.learned), (plain.held_out, inverted.held_out)):
        assert torch.equal(one.tensors[1], other.tensors[1])
        assert torch.equal(one.tensors[0] + other.tensors[0], torch.ones_like(one.tensors[0]))


@pytest.mark.slow
def test_command_runs_and_writes_the_page_from_the_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "PRETRAINING_STEPS", 20)
    config = tmp_path / "small.toml"
    config.write_text(
        'task = "digits"\nlr = 1e-3\nmethods = ["full", "random 0.25"]\nprimary = []\nseeds = [0]\ntuning_seed = 9\n'
        "steps = 4\nevaluations = 1\nblends = 0\nlevel_steps = [0]\ntarget = 0.5\nclimbs = 0\n"
        'starts = { "random 0.25" = 1 }\n'
    )
    options = [str(config), "--runs", str(tmp_path / "runs"), "--methods", "full"]
    assert main(options) == 0
    page = capsys.readouterr().out
    assert "| full |" in page
    assert main([*options, "--page"]) == 0
    assert capsys.readouterr().out == page
    # On another machine, where only the file is, nothing is run again; runs of other settings are not written over.
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("benchmarks.forgetting.comparison.run_trial", _refuse)
        options[2] = str(tmp_path / "elsewhere")
        assert main(options) == 0
        assert capsys.readouterr().out == page
        config.write_text(config.read_text().replace("steps = 4", "steps = 5"))
        options[2] = str(tmp_path / "other")
        before = (tmp_path / "small-runs.csv").read_bytes()
        assert main(options) == 1
        assert "small-runs.csv holds runs of other settings" in capsys.readouterr().err
        assert (tmp_path / "small-runs.csv").read_bytes() == before
    with pytest.raises(SystemExit):
        parse([str(config), "--methods", "kappa 0.3"])
    assert "has no 'kappa 0.3'" in capsys.readouterr().err


def _refuse(setup, spec, candidate):
    raise RuntimeError(f"would run {spec.candidate}")
