import math
from dataclasses import replace

import pytest

from kappa_lightning.pilot.adaptation import Point, Reading
from kappa_lightning.pilot.candidates import walk_back_of
from kappa_lightning.pilot.executor import OutOfTimeError
from kappa_lightning.pilot.race import Rules, dominated, judge, race
from kappa_lightning.pilot.rows import entries_of
from kappa_lightning.pilot.search import Outcome
from kappa_lightning.pilot.trial import Run, Spec

BACK = walk_back_of("val/loss", 1.0, ())
RULES = Rules(target=0.8, level=None, seed=0, race_seeds=2, confirm_seeds=4, finalists=2)


class Model:
    """Stands for an executor: candidates whose loss and retention are functions of rate and seed."""

    def __init__(self, seconds=1.0, limit=None, workers=1):
        self.seconds, self.limit, self.workers = seconds, limit, workers
        self.specs = []
        self.broken = {}
        # What is kept at the level, and the slowest step that arrives there.
        self.kept = {"full": (0.8, 0), "good": (0.95, 3), "close": (0.94, 1), "bad": (0.4, -3), "never": (0.9, 99)}

    raised = {}  # noqa: RUF012 - nothing is added

    @property
    def spent(self):
        return len(self.specs) * self.seconds

    def __call__(self, specs):
        runs = []
        for spec in specs:
            if self.limit is not None and self.spent + self.seconds > self.limit:
                raise OutOfTimeError("no time")
            self.specs.append(spec)
            runs.append(self.run(spec))
        return runs

    def attempt(self, specs):
        fine = [spec for spec in specs if spec.candidate not in self.broken]
        failed = {spec.candidate: self.broken[spec.candidate] for spec in specs if spec.candidate in self.broken}
        return self(fine), failed

    def run(self, spec):
        kept, slowest = self.kept[spec.candidate]
        noise = 0.01 * math.sin(17 * spec.seed + len(spec.candidate))
        # The best full run, at step 2, comes to 1.0: the level is 4 − 0.8·3 = 1.6.
        lowest = 1.6 - 0.3 * (spec.step - slowest) if spec.candidate != "full" else max(1.0, 1.6 - 0.3 * spec.step)
        lowest = max(lowest, 1.0) + 0.001
        path = (Point(0, 4.0, {"old": 1.0}), Point(9, lowest, {"old": kept + noise - 0.05 * (1.6 - lowest)}))
        if lowest > 1.6 and spec.step == slowest:
            path = (path[0], Point(9, 1.6, {"old": kept + noise}))
        return Run(spec, path, (), {"old": 1.0}, 10, 20, self.seconds)


def test_race_finds_the_level_the_rates_and_the_best_on_fresh_seeds_and_the_other_half():
    model = Model()
    course = race(model, ["full", "good", "close", "bad", "never"], RULES)
    assert course.level == pytest.approx(4 - 0.8 * (4 - 1.001))
    assert course.rates["never"] is None
    assert course.rates["good"] in (3, 4)
    assert set(course.confirmed) == {"good", "close"}
    assert "bad" in course.dropped
    halves = {spec.half: {s.seed for s in model.specs if s.half == spec.half} for spec in model.specs}
    assert halves == {"search": {0, 1, 2}, "confirm": {3, 4, 5, 6}}
    seeds = {name: sorted(outcomes) for name, outcomes in course.confirmed.items()}
    assert seeds["good"] == seeds["close"] == [3, 4, 5, 6]
    # Who dropped out is not run any more.
    last = max(s.seed for s in model.specs if s.candidate == "bad")
    assert last == course.dropped["bad"]
    assert course.unfinished == []


def test_race_is_the_same_again():
    names = ["full", "good", "close", "bad"]
    assert race(Model(), names, RULES) == race(Model(), names, RULES)


def test_too_little_time_is_too_little_for_all_and_is_said():
    model = Model(limit=24.0)
    course = race(model, ["full", "good", "close", "bad"], RULES)
    assert model.spent <= 24
    assert course.unfinished
    # Every candidate had its first run before any had its third.
    first = [s.candidate for s in model.specs if s.candidate != "full"][:3]
    assert sorted(first) == ["bad", "close", "good"]
    with pytest.raises(OutOfTimeError):
        race(Model(limit=2.0), ["full", "good"], RULES)


def test_candidate_that_cannot_run_is_left_out_and_its_error_is_kept():
    model = Model()
    model.broken["close"] = ValueError("no such tensor")
    names = ["full", "good", "close", "bad"]
    course = race(model, names, RULES)
    assert course.failed == model.broken
    assert course.rates["close"] is None
    assert set(course.confirmed) == {"good", "full"}
    rows = entries_of(course, names, dict.fromkeys(names), 0.9, 0.0, BACK)
    assert (rows[-1].name, rows[-1].stage, rows[-1].error) == ("close", "failed", "failed: ValueError: no such tensor")
    model.broken = dict.fromkeys(("full", "good"), ValueError("all of them"))
    with pytest.raises(ValueError, match="all of them"):
        race(model, ["full", "good"], Rules(0.8, 1.6, 0, 1, 2, 2))


def test_time_that_is_shown_is_of_runs_that_came_to_an_end():
    model, names = Model(), ["full", "good"]
    course = race(model, names, RULES)
    seed, outcome = next(iter(course.confirmed["good"].items()))
    slow = replace(outcome, run=replace(outcome.run, seconds=9.0))
    course.confirmed["good"][seed] = slow
    seconds = {e.name: e.seconds for e in entries_of(course, names, dict.fromkeys(names), 0.9, 0.0, BACK)}
    assert seconds["good"] == 3.0
    course.raised = {slow.run.spec: ValueError("found invalid values")}
    rows = {e.name: e for e in entries_of(course, names, dict.fromkeys(names), 0.9, 0.0, BACK)}
    assert rows["good"].seconds == 1.0
    assert rows["good"].error == "1 run raised and counted as diverged: ValueError: found invalid values"
    course.raised = {each.run.spec: ValueError("all of them") for each in course.confirmed["good"].values()}
    rows = {e.name: e for e in entries_of(course, names, dict.fromkeys(names), 0.9, 0.0, BACK)}
    assert math.isnan(rows["good"].seconds)
    assert rows["good"].trainable == 10


def test_search_without_time_is_told_from_one_that_arrives_nowhere():
    names = ["full", "good", "never"]
    course = race(Model(limit=24.0), names, RULES)
    assert course.unfinished
    stages = {e.name: e.stage for e in entries_of(course, names, dict.fromkeys(names), 0.9, 0.0, BACK)}
    assert stages["never"] == "cut off"
    whole = race(Model(), names, RULES)
    stages = {e.name: e.stage for e in entries_of(whole, names, dict.fromkeys(names), 0.9, 0.0, BACK)}
    assert stages["never"] == "not arrived"


def test_level_that_nobody_reaches_is_an_error_that_names_the_nearest():
    model = Model()
    with pytest.raises(ValueError, match=r"down to a loss of 0\.5; the nearest, 'never'"):
        race(model, ["never"], Rules(0.8, 0.5, 0, 1, 2, 2))


def outcome(kept, arrived=True, walked=None):
    reading = Reading(1.0, {"old": kept}) if arrived else None
    back = None if walked is None else Reading(0.5, {"old": walked})
    return Outcome(Run(Spec("x", 0, 0), (), (), {}, 1, 1, 1.0), reading, back, 1)


def test_dominated_is_who_is_behind_by_more_than_the_seeds_differ():
    best = {seed: outcome(0.9 + 0.01 * seed) for seed in range(3)}
    behind = {seed: outcome(0.7 + 0.01 * seed) for seed in range(3)}
    noisy = {0: outcome(0.95), 1: outcome(0.6), 2: outcome(0.9)}
    absent = {0: outcome(0.99), 1: outcome(0, arrived=False), 2: outcome(0, arrived=False)}
    assert dominated({"best": best, "behind": behind, "noisy": noisy, "absent": absent}) == ["behind", "absent"]
    # Walked back it is as good as the best.
    back = {seed: outcome(0.7, walked=0.9) for seed in range(3)}
    assert dominated({"best": best, "back": back}) == []


def test_race_keeps_who_is_behind_by_less_than_the_margin_and_drops_who_misses_where_the_best_arrives():
    best = {seed: outcome(0.998) for seed in range(2)}
    near = {seed: outcome(0.995) for seed in range(2)}
    misses = {0: outcome(0.999), 1: outcome(0, arrived=False)}
    assert dominated({"best": best, "near": near}) == ["near"]
    assert dominated({"best": best, "near": near, "misses": misses}, margin=0.01) == ["misses"]


def readings(*kept):
    return {seed: None if value is None else Reading(1.0, {"old": value}) for seed, value in enumerate(kept)}


def test_answer_is_the_set_that_cannot_be_told_from_the_best():
    verdicts = judge(
        {
            ("best", False): readings(0.95, 0.93, 0.96, 0.94, 0.95),
            ("near", False): readings(0.94, 0.95, 0.93, 0.95, 0.94),
            ("far", False): readings(0.85, 0.84, 0.85, 0.83, 0.86),
            ("misses", False): readings(0.99, 0.99, None, 0.99, 0.99),
        }
    )
    assert {name: v.in_set for (name, _), v in verdicts.items()} == {
        "best": True, "near": True, "far": False, "misses": False
    }  # fmt: skip
    assert verdicts["far", False].p < 0.01
    assert verdicts["best", False].p == 1.0


def test_difference_within_the_margin_is_not_told_apart_however_sure_it_is():
    entries = {
        ("best", False): readings(0.998, 0.998, 0.998, 0.998),
        ("near", False): readings(0.995, 0.9951, 0.995, 0.9951),
        ("far", False): readings(0.97, 0.971, 0.97, 0.971),
    }
    assert [v.in_set for v in judge(entries).values()] == [True, False, False]
    within = judge(entries, margin=0.01)
    assert [v.in_set for v in within.values()] == [True, True, False]
    assert [v.near for v in within.values()] == [True, True, False]
    # Far in the mean, and the seeds do not agree.
    noisy = judge({**entries, ("noisy", False): readings(0.998, 0.9, 0.999, 0.96)}, margin=0.01)["noisy", False]
    assert (noisy.in_set, noisy.near) == (True, False)
    # 0.0275 − 0.01 = 0.0175, with a deviation of 0.00058 over four seeds: t = 60.6 with three degrees of freedom.
    assert within["far", False].p == pytest.approx(2 * 9.87e-6, rel=0.02)


def test_one_seed_tells_nothing_apart():
    verdicts = judge({("a", False): readings(0.9), ("b", True): readings(0.2)})
    assert all(verdict.in_set for verdict in verdicts.values())
    assert judge({}) == {}


def test_nothing_is_the_answer_if_nothing_arrives():
    verdicts = judge({("a", False): readings(None, None), ("b", False): readings(None, None)})
    assert not any(verdict.in_set or verdict.near for verdict in verdicts.values())


def test_level_that_is_not_below_the_start_is_named():
    with pytest.raises(ValueError, match="level=4 is not below the held-out loss before training, 4"):
        race(Model(), ["good"], Rules(0.8, 4.0, 0, 1, 2, 2))
