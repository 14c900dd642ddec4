from kappa_lightning.pilot.adaptation import Point
from kappa_lightning.pilot.progress import Progress
from kappa_lightning.pilot.race import Rules
from kappa_lightning.pilot.trial import Run, Spec

RULES = Rules(target=0.8, level=1.0, seed=0, race_seeds=2, confirm_seeds=4, finalists=2)
RUN = Run(Spec("full", 2, 0), (Point(9, 1.5, {"old": 0.75}),), (), {"old": 1.0}, 10, 20, 120.0)


def test_line_of_a_run_says_what_came_out_and_what_is_left_of_the_time(capsys):
    # Three candidates: nine runs for their rates, four in the race, eight to confirm.
    one, two = (Progress(True, 3, RULES, hours=2, workers=workers) for workers in (1, 2))
    one.begin(None)
    one.begin(120.0)
    two.begin(1200.0)
    one.run(RUN, known=False)
    two.run(RUN, known=True)
    first, known, long, line, shared = capsys.readouterr().err.splitlines()
    assert first.startswith("pilot: about 21 runs; at most 2 hours")
    assert known.startswith("pilot: about 21 runs of some 120 s, 42 minutes in all; at most 2 hours")
    assert long.startswith("pilot: about 21 runs of some 1200 s, 3.5 hours in all; at most 2 hours")
    assert line == "1/~21 full, rate × 2, seed 0, all: loss 1.5, 0.7500 kept, 120 s; about 40 min left"
    assert shared == "1/~21 full, rate × 2, seed 0, all: loss 1.5, 0.7500 kept, done before; about 20 min left"


def test_nothing_is_said_if_it_is_not_wanted(capsys):
    silent = Progress(False, 3, RULES, hours=None)
    silent.begin(1.0)
    silent.run(RUN, known=False)
    assert capsys.readouterr().err == ""
