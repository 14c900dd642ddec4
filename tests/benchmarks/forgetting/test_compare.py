import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import benchmarks.forgetting.digits
import benchmarks.forgetting.run
import benchmarks.forgetting.sweep
from benchmarks.forgetting.__main__ import main, parse
from benchmarks.forgetting.digits import Digits, InvertedDigits
from benchmarks.forgetting.report import baselines, curves_figure, learning_rates, markdown, read_off
from benchmarks.forgetting.run import Plan, Run, execute
from benchmarks.forgetting.settings import Settings
from benchmarks.forgetting.sweep import Place, Sweep, choose, sweep

PLAN = Plan(
    task="digits", method="full", lr=1e-3, seed=0, budget=0.25, strength=0.0, epochs=2, steps_per_epoch=2, options={}
)
SETTINGS = Settings(
    task="digits", methods=("full", "kappa"), lrs=(1e-3, 4e-3), seeds=(0, 1), tuning_seed=9, epochs=2,
    steps_per_epoch=2, levels=(0.5,), level=0.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _short_pretraining(monkeypatch):
    monkeypatch.setattr(benchmarks.forgetting.digits, "PRETRAINING_STEPS", 20)
    monkeypatch.setattr(benchmarks.forgetting.run, "BLENDS", 4)


def run_of(method, seed, path, lr=1e-3):
    plan = replace(PLAN, method=method, seed=seed, lr=lr)
    return Run(plan, path, {"plain": [retention for _, retention in path]}, trainable=10, seconds=1.0)


# One run


def test_digits_are_split_the_same_way_and_inverted():
    plain, inverted = Digits(3, inverted=False), Digits(3, inverted=True)
    for one, other in ((plain.learned, inverted.learned), (plain.held_out, inverted.held_out)):
        assert torch.equal(one.tensors[1], other.tensors[1])
        assert torch.equal(one.tensors[0] + other.tensors[0], torch.ones_like(one.tensors[0]))
    learned = {image.numpy().tobytes() for image in plain.learned.tensors[0]}
    held_out = {image.numpy().tobytes() for image in plain.held_out.tensors[0]}
    assert (len(learned), len(held_out)) == (898, 450)
    assert not learned & held_out


def test_pretrained_weights_are_kept_and_equal_for_equal_seeds(tmp_path):
    first = InvertedDigits().model(0, 1e-3, tmp_path).state_dict()
    again = InvertedDigits().model(0, 5e-3, tmp_path).state_dict()
    other = InvertedDigits().model(1, 1e-3, tmp_path).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-pretrained-0.pt", "digits-pretrained-1.pt"]


def test_path_begins_before_the_first_step_and_has_a_point_for_each_epoch(tmp_path):
    run = execute(PLAN, tmp_path)
    assert len(run.path) == len(run.probes["plain"]) == PLAN.epochs + 1
    assert run.path[0][1] == 1
    assert run.path[-1][0] < run.path[0][0]
    assert run.path[-1][1] == pytest.approx(run.probes["plain"][-1] / run.probes["plain"][0])
    model = InvertedDigits().model(0, 1e-3, tmp_path).eval()
    images, labels = Digits(0, inverted=True).held_out.tensors
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    assert run.path[0][0] == pytest.approx(float(loss), rel=1e-5)
    assert execute(PLAN, tmp_path).path == run.path


def test_wise_ft_walks_from_the_pretrained_to_the_trained_weights(tmp_path):
    full, wise = (execute(replace(PLAN, method=method), tmp_path) for method in ("full", "wise_ft"))
    assert len(wise.path) == 5
    assert wise.path[0] == pytest.approx(full.path[0])
    assert wise.path[-1] == pytest.approx(full.path[-1])


@pytest.mark.parametrize("method", ["kappa", "lora_all", "soft:1/kappa"])
def test_walk_back_from_kept_weights_is_that_of_training_again(method, tmp_path):
    plan = replace(PLAN, method=f"wise:{method}")
    again = execute(plan, tmp_path)
    run = execute(replace(PLAN, method=method), tmp_path, keep_weights=True)
    assert again.path[-1] == pytest.approx(run.path[-1])
    assert again.trainable == run.trainable
    kept = execute(plan, tmp_path)
    assert (kept.path, kept.trainable) == (again.path, again.trainable)
    state = torch.load(replace(PLAN, method=method).weights(tmp_path), weights_only=True)
    assert sum(tensor.numel() for tensor in state.values()) == run.trainable


def test_run_survives_its_file_and_another_plan_in_its_place_is_refused(tmp_path):
    run = run_of("kappa within shape", 3, [(4.0, 1.0), (0.1, 0.25)])
    run.save(tmp_path)
    assert Run.load(run.plan, tmp_path) == run
    assert Run.load(replace(run.plan, seed=4), tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["digits-kappa-within-shape-budget0.25-lr0.001-seed3.json"]
    with pytest.raises(ValueError, match="another epochs"):
        Run.load(replace(run.plan, epochs=5), tmp_path)


# The sweep


def test_learning_rate_is_that_of_most_retention_at_the_level_of_the_best_full_run():
    full = [run_of("full", 9, [(5.0, 1.0), (2.0, 0.9)], 1e-3), run_of("full", 9, [(5.0, 1.0), (1.0, 0.6)], 4e-3)]
    # The level is 5 − 0.75·4 = 2: retention 0.9, and 0.7 on the line from (5, 1) to (1, 0.6).
    assert choose(full, full, 0.75).lr == 1e-3
    # At 5 − 0.8·4 = 1.8 only the second one arrives.
    assert choose(full, full, 0.8).lr == 4e-3
    # Nobody arrives: the lowest loss.
    kappa = [run_of("kappa", 9, [(5.0, 1.0), (4.0, 1.0)], 1e-3), run_of("kappa", 9, [(5.0, 1.0), (3.0, 0.2)], 4e-3)]
    assert choose(kappa, full, 0.8).lr == 4e-3


def test_interrupted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    executed = []

    def fails_at(limit):
        def run(plan, folder, **options):
            if len(executed) == limit:
                raise KeyboardInterrupt
            executed.append(plan)
            # The larger rate keeps more.
            return run_of(plan.method, plan.seed, [(4.0, 1.0), (1.0, 0.5 + 50 * plan.lr)], plan.lr)

        return run

    monkeypatch.setattr(benchmarks.forgetting.sweep, "execute", fails_at(5))
    with pytest.raises(KeyboardInterrupt):
        sweep(SETTINGS, Place(tmp_path))
    monkeypatch.setattr(benchmarks.forgetting.sweep, "execute", fails_at(100))
    found = sweep(SETTINGS, Place(tmp_path))
    seen = [(plan.method, plan.lr, plan.seed) for plan in executed]
    tuning = [(method, lr, 9) for method in ("full", "kappa") for lr in (1e-3, 4e-3)]
    assert seen == tuning + [(method, 4e-3, seed) for seed in (0, 1) for method in ("full", "kappa")]
    assert sweep(SETTINGS, Place(tmp_path)) == found
    assert len(executed) == 8


def test_other_processes_give_the_run_of_this_one(tmp_path):
    InvertedDigits().model(0, 1e-3, tmp_path)  # the worker's own pretraining would have its full length
    (run,) = benchmarks.forgetting.sweep._run([PLAN], Place(tmp_path, workers=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run.path == execute(PLAN, tmp_path).path
    torch.set_num_threads(threads)


def test_grid_grows_beyond_its_end_until_the_best_rate_is_inside(tmp_path, monkeypatch):
    retained = {5e-4: 0.2, 1e-3: 0.9, 4e-3: 0.6, 2e-3: 0.8, 8e-3: 0.5}

    def run(plan, folder, **options):
        return run_of(plan.method, plan.seed, [(4.0, 1.0), (1.0, retained[plan.lr])], plan.lr)

    monkeypatch.setattr(benchmarks.forgetting.sweep, "execute", run)
    settings = replace(SETTINGS, lrs=(2e-3, 4e-3), seeds=(0,), widen=5)
    found = sweep(settings, Place(tmp_path))
    assert sorted(run.plan.lr for run in found.tuning["kappa"]) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert found.runs["kappa"][0].plan.lr == 1e-3
    narrow = sweep(replace(settings, widen=0), Place(tmp_path))
    assert narrow.runs["kappa"][0].plan.lr == 2e-3
    assert sweep(settings, Place(tmp_path, only_report=True)) == found


# The report


def example():
    paths = {
        "full": [[(5.0, 1.0), (1.0, 0.6)], [(6.0, 1.0), (2.0, 0.8)]],
        "random": [[(5.0, 1.0), (2.0, 0.7)], [(6.0, 1.0), (2.0, 0.9)]],
        "kappa": [[(5.0, 1.0), (4.0, 0.9)], [(6.0, 1.0), (1.0, 0.5)]],
    }
    runs = {method: {s: run_of(method, s, path) for s, path in enumerate(found)} for method, found in paths.items()}
    return Sweep({method: [] for method in paths}, runs)


def test_readings_are_those_by_hand():
    # At half of full's way the losses are 3 and 4.
    full, random, kappa = read_off(example(), 0.5)
    assert full.retention == pytest.approx({0: 0.8, 1: 0.9})
    assert random.retention == pytest.approx({0: 0.8, 1: 0.95})
    assert math.isnan(kappa.retention[0])
    assert kappa.retention[1] == pytest.approx(0.8)
    assert (kappa.interval.count, kappa.seeds) == (1, 2)
    assert random.to_full.mean == pytest.approx(0.025)
    assert (random.to_full.low, random.to_full.high) == pytest.approx((0.0, 0.05))
    assert kappa.to_random.mean == pytest.approx(-0.15)


def test_table_puts_methods_that_arrive_first_and_the_most_retentive_before_others():
    lines = markdown(example(), read_off(example(), 0.5)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["random", "full", "kappa"]
    assert (
        "| 2/2 | 0.875 [0.800, 0.950] | +0.025 [+0.000, +0.050] | +0.000 [+0.000, +0.000] | – | 10 | 0.001 |"
        in lines[4]
    )
    assert "| 1/2 | 0.800 | -0.100 | -0.150 | 1.000 |" in lines[6]


def test_report_says_what_was_there_before():
    assert baselines(example()) == "Before the first step: plain 1.000 [1.000, 1.000]; task loss 5.500 [5.000, 6.000]."


def test_learning_rates_are_compared_at_one_loss():
    full = [run_of("full", 9, [(5.0, 1.0), (1.0, 0.6)], 1e-3), run_of("full", 9, [(5.0, 1.0), (2.0, 0.4)], 4e-3)]
    kappa = [run_of("kappa", 9, [(5.0, 1.0), (4.0, 0.9)], 1e-3), run_of("kappa", 9, [(5.0, 1.0), (1.0, 0.2)], 2e-3)]
    table = learning_rates(Sweep({"full": full, "kappa": kappa}, {}), 0.5).splitlines()
    # At loss 3: halfway of the first run of full, two thirds of the second, halfway of the second of kappa.
    assert table[2:] == [
        "| method | 0.001 | 0.002 | 0.004 |",
        "|---|---:|---:|---:|",
        "| full | 0.800 |  | 0.600 |",
        "| kappa | × | 0.600 |  |",
    ]


def test_figure_has_a_curve_for_each_method_that_ends_where_a_run_stops():
    (axes,) = curves_figure(example()).axes
    ends = {line.get_label(): line.get_xdata()[-1] for line in axes.lines}
    assert ends["full"] == pytest.approx(0.99)
    # Random stops at loss 2 of 5 → 1 with the first seed, κ at 4.
    assert 0.73 < ends["random"] <= 0.75
    assert 0.23 < ends["kappa"] <= 0.25


def test_command_runs_reports_and_reports_again(tmp_path, capsys):
    config = tmp_path / "small.toml"
    config.write_text(
        'task = "digits"\nmethods = ["full", "kappa"]\nlrs = [1e-3]\nseeds = [0]\ntuning_seed = 9\nepochs = 2\n'
        "steps_per_epoch = 2\nlevels = [0.5]\nlevel = 0.5\n"
    )
    options = [str(config), "--runs", str(tmp_path / "runs")]
    assert main(options) == 0
    table = capsys.readouterr().out
    assert "| full | 1/1 |" in table
    assert {path.name for path in tmp_path.glob("small*")} == {
        "small.toml", "small.md", "small.png", "small-paths.csv", "small-retention.csv"
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "small-paths.csv").open()))
    assert len(rows) == 2 * 2 * 3
    saved = json.loads((tmp_path / "runs" / "digits-kappa-budget0.25-lr0.001-seed0.json").read_text())
    reported = [row for row in rows if (row["method"], row["kind"]) == ("kappa", "reported")]
    assert [float(row["loss"]) for row in reported] == pytest.approx([loss for loss, _ in saved["path"]], rel=1e-5)
    assert main([*options, "--only-report"]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widen": -1}, "widen=-1"),
        ({"task": "chess"}, "task='chess' is unknown"),
        ({"methods": ("kappa",)}, "lack 'full'"),
        ({"methods": ("full", "kapa")}, "'kapa' is none of"),
        ({"seeds": (9,)}, "tuning_seed=9"),
        ({"lrs": ()}, "lrs and seeds"),
        ({"level": 0.7}, "level=0.7"),
        ({"levels": (0.5, 1.0)}, "between 0 and 1"),
    ],
)
def test_setting_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_option_on_the_command_line_goes_over_the_configuration(tmp_path, capsys):
    config = tmp_path / "scenes.toml"
    config.write_text(
        'task = "scenes"\nmethods = ["full"]\nlrs = [1e-3]\nseeds = [0]\ntuning_seed = 9\nepochs = 1\n'
        'steps_per_epoch = 1\n[options]\nsts = "here.csv"\npairs = "50"\n'
    )
    args = parse([str(config), "--option", "sts=a=b.csv"])
    assert args.settings_read.options == {"sts": "a=b.csv", "pairs": "50"}
    with pytest.raises(SystemExit):
        parse([str(config), "--option", "sts"])
    assert "--option sts: give NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('task = "digits"\ncolor = 1\n', r"unknown entries: \['color'\]; missing entries: \['epochs'"),
        ("task =", "Invalid"),
    ],
)
def test_configuration_that_cannot_be_read_is_a_usage_error(tmp_path, capsys, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse([str(file)])
    assert caught.value.code == 2
    assert pytest.importorskip("re").search(message, capsys.readouterr().err)


def test_committed_configurations_are_valid():
    import pathlib

    files = sorted((pathlib.Path(__file__).parents[3] / "benchmarks" / "forgetting" / "evidence").glob("*.toml"))
    assert files
    for file in files:
        Settings.read(file)
