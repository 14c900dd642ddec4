import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kappa_lightning.profile.compute
from kappa_lightning import KappaFreezeCallback, KappaProfile
from kappa_lightning.cli import main
from kappa_lightning.selection import CRITERIA

PNG = b"\x89PNG\r\n\x1a\n"

KAPPAS = {
    "layers.0.attn.weight": 50.0,
    "layers.0.mlp.weight": 3.0,
    "layers.1.attn.weight": 400.0,
    "layers.1.mlp.weight": 2.0,
    "head.weight": 9.0,
}
RANKING = ["layers.1.mlp.weight", "layers.0.mlp.weight", "head.weight", "layers.0.attn.weight", "layers.1.attn.weight"]


def state_dict():
    """6 × 6 matrices of chosen condition numbers, of which ``head`` is 12 × 6."""
    random, state = np.random.default_rng(0), {}
    for name, kappa in KAPPAS.items():
        rows = 12 if name == "head.weight" else 6
        left, right = (
            np.linalg.qr(random.standard_normal((rows, 6)))[0],
            np.linalg.qr(random.standard_normal((6, 6)))[0],
        )
        state[name] = torch.tensor(left @ np.diag(np.geomspace(kappa, 1.0, 6)) @ right, dtype=torch.float32)
        state[name.replace("weight", "bias")] = torch.zeros(rows)
    return state


@pytest.fixture
def checkpoint(tmp_path):
    save_file(state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture
def scan(capsys, checkpoint):
    """Runs ``kappa-lightning scan`` on the checkpoint; gives (exit status, standard output, standard error)."""

    def run(*options, model=checkpoint):
        capsys.readouterr()
        status = main(["scan", str(model), *map(str, options)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def wrong(capsys, checkpoint):
    """Standard error of a command line that the parser refuses with exit status 2."""

    def run(*argv):
        with pytest.raises(SystemExit) as caught:
            main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert out == ""
        assert "usage: kappa-lightning" in err
        return err

    return run


def names_in(out):
    return out.splitlines()


def assert_error(result, *parts):
    status, out, err = result
    assert status == 1
    assert out == ""
    message = err[err.index("kappa-lightning: error:") :]
    assert err.splitlines()[-1].startswith("kappa-lightning: error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in message


# The table


def test_table_has_every_tensor_with_shape_and_kappa_in_the_order_of_the_ranking(scan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, out, _ = scan("--num-tensors", 2)
    assert status == 0
    lines = [line.split() for line in out.splitlines() if ".weight" in line]
    assert [line[1] for line in lines] == RANKING
    assert [line[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert [line[2] for line in lines] == ["6×6", "6×6", "12×6", "6×6", "6×6"]
    np.testing.assert_allclose([float(line[3].replace(",", "")) for line in lines], sorted(KAPPAS.values()), rtol=0.02)
    assert [line[4:] for line in lines] == [["yes"], ["yes"], [], [], []]


def test_selection_is_summed_up_in_tensors_and_parameters(scan):
    _, out, _ = scan("--num-tensors", 3)
    last = out.strip().splitlines()[-1]
    assert "3 of 5 tensors" in last
    assert "144 of 216 parameters" in last
    assert "66.7%" in last


def test_names_in_a_narrow_terminal_are_not_cut(scan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = scan()
    assert "…" not in out
    for part in ("attn", "head", "400"):
        assert part in out


def test_brackets_in_a_name_are_no_markup(scan, tmp_path):
    save_file({"blocks.[bold].weight": torch.randn(3, 3)}, tmp_path / "b.safetensors")
    _, out, _ = scan(model=tmp_path / "b.safetensors")
    assert "blocks.[bold].weight" in out


def test_name_is_shown_as_it_is_without_emoji(scan, tmp_path):
    save_file({"a:smile:.weight": torch.randn(3, 3), "[red]x[/red].weight": torch.eye(3)}, tmp_path / "b.safetensors")
    _, out, _ = scan(model=tmp_path / "b.safetensors")
    assert "a:smile:.weight" in out
    assert "[red]x[/red].weight" in out


@pytest.mark.parametrize("options", [[], ["--names", "--top-p", 1]], ids=str)
def test_control_and_direction_characters_of_a_name_are_escaped(scan, tmp_path, options):
    name = "a\x1b[2J\nb.weight\u202e\u2028"
    save_file({name: torch.eye(3)}, tmp_path / "b.safetensors")
    _, out, _ = scan(*options, model=tmp_path / "b.safetensors")
    assert "a\\x1b[2J\\nb.weight\\u202e\\u2028" in out
    assert not set("\x1b\u202e\u2028") & set(out)
    if options:
        assert len(out.splitlines()) == 1


def test_name_in_an_error_is_escaped(scan, tmp_path):
    save_file({"a\x1b[2J\n.weight": torch.full((3, 3), float("nan"))}, tmp_path / "n.safetensors")
    assert_error(scan(model=tmp_path / "n.safetensors"), "a\\x1b[2J", "NaN")


def test_headings_of_a_narrow_terminal_are_not_folded(scan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    _, out, _ = scan()
    heading = next(line for line in out.splitlines() if "tensor" in line)
    assert heading.split() == ["tensor", "shape", "κ", "trains"]


def test_table_in_a_pipe_has_each_name_on_one_line(scan, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "layers." * 30 + "weight"
    save_file({name: torch.eye(3)}, tmp_path / "b.safetensors")
    assert name in scan(model=tmp_path / "b.safetensors")[1]


def test_one_tensor_is_no_tensors(scan, tmp_path):
    save_file({"a.weight": torch.eye(3)}, tmp_path / "b.safetensors")
    assert scan(model=tmp_path / "b.safetensors")[1].splitlines()[-1].startswith("1 of 1 tensor trains")


def test_infinite_kappa_is_shown_as_such(scan, tmp_path):
    save_file({"a.weight": torch.eye(3), "dead.weight": torch.zeros(3, 3)}, tmp_path / "b.safetensors")
    status, out, _ = scan(model=tmp_path / "b.safetensors")
    assert status == 0
    assert "∞" in next(line for line in out.splitlines() if "dead.weight" in line)


# The names


def test_names_are_alone_on_standard_output_one_a_line_in_the_order_of_the_ranking(scan):
    status, out, _ = scan("--names", "--num-tensors", 4)
    assert status == 0
    assert out == "\n".join(RANKING[:4]) + "\n"


def test_without_a_budget_a_fifth_trains(scan):
    assert names_in(scan("--names")[1]) == RANKING[:1]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (["--top-p", "0.6"], RANKING[:3]),
        (["--top-p=1"], RANKING),
        (["--num-tensors", "2"], RANKING[:2]),
        (["--max-kappa", "10"], RANKING[:3]),
        (["--max-kappa", "1e9"], RANKING),
        (["--max-params", "80"], RANKING[:2]),
        (["--max-params", "144"], RANKING[:3]),
        (["--max-params", "0.5"], RANKING[:2]),
        (["--max-params", "5e-1"], RANKING[:2]),
        (["--max-params", "1.0"], RANKING),
    ],
    ids=" ".join,
)
def test_budget_selects_what_a_hand_calculation_does(scan, budget, expected):
    status, out, _ = scan("--names", *budget)
    assert status == 0
    assert names_in(out) == expected


def test_max_params_of_one_is_one_parameter_and_not_all_of_them(scan):
    assert_error(scan("--max-params", "1"), "36")


def test_include_and_exclude_take_several_globs(scan):
    options = ("--top-p", "1.0", "--names", "--include", "layers.*", "head.*", "--exclude", "*attn*", "*.1.*")
    assert names_in(scan(*options)[1]) == ["layers.0.mlp.weight", "head.weight"]


def test_criterion_ranks(scan, monkeypatch):
    monkeypatch.setitem(CRITERIA, "worst first", lambda row: -row.kappa)
    assert names_in(scan("--names", "--top-p", 1, "--criterion", "worst first")[1]) == RANKING[::-1]


def test_criterion_can_be_reversed_random_and_within_groups(scan, checkpoint):
    assert names_in(scan("--names", "--top-p", 1, "--criterion", "reversed:kappa")[1]) == RANKING[::-1]
    profile = KappaProfile.from_checkpoint(checkpoint, progress=False)
    for options in ({"criterion": "random", "seed": 3}, {"within": "role"}):
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert names_in(scan("--names", "--top-p", 1, *flags)[1]) == profile.select(top_p=1.0, **options)


def test_experts_are_combined_as_asked(scan, tmp_path):
    stack = torch.stack([torch.diag(torch.tensor([kappa, 1.0, 1.0])) for kappa in (2.0, 100.0, 3.0)])
    save_file({"experts.up": stack, "a.weight": torch.diag(torch.tensor([5.0, 1.0]))}, tmp_path / "e.safetensors")
    first = {
        how: names_in(scan("--names", "--num-tensors", 1, "--experts", how, model=tmp_path / "e.safetensors")[1])
        for how in ("mean", "median", "max")
    }
    assert first == {"mean": ["a.weight"], "median": ["experts.up"], "max": ["a.weight"]}


# The files


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ("12345", 12345),
        ("2k", 2048),
        ("1.5M", 3 << 19),
        ("8G", 8 << 30),
        ("8 GB", 8 << 30),
        ("8Gi", 8 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_memory_is_a_budget_in_bytes(scan, monkeypatch, size, wanted):
    given = []
    original = KappaProfile.from_checkpoint
    monkeypatch.setattr(
        KappaProfile,
        "from_checkpoint",
        lambda path, **options: given.append(options["memory_budget"]) or original(path, **options),
    )
    scan("--memory", size)
    assert given == [wanted]


def test_out_is_the_profile_of_the_checkpoint(scan, checkpoint, tmp_path):
    status, _, _ = scan("--out", tmp_path / "kappa.json", "--rtol", "1e-5", "--solver", "svd", "--experts", "max")
    assert status == 0
    expected = KappaProfile.from_checkpoint(checkpoint, progress=False, rtol=1e-5, solver="svd", experts="max")
    loaded = KappaProfile.load(tmp_path / "kappa.json")
    assert loaded == expected
    assert (loaded.rtol, loaded.solver, loaded.experts) == (1e-5, "svd", "max")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kappa.json", "w.safetensors"]


@pytest.mark.parametrize(("name", "start"), [("k.png", PNG), ("k.pdf", b"%PDF-"), ("k.svg", b"<?xml")])
def test_figure_is_written_in_the_format_of_its_suffix(scan, tmp_path, name, start):
    assert scan("--figure", tmp_path / name)[0] == 0
    assert (tmp_path / name).read_bytes().startswith(start)


def test_names_figure_and_out_go_together(scan, tmp_path):
    status, out, _ = scan("--names", "--out", tmp_path / "k.json", "--figure", tmp_path / "k.png")
    assert status == 0
    assert names_in(out) == RANKING[:1]
    assert (tmp_path / "k.json").exists()
    assert (tmp_path / "k.png").exists()


def test_relative_outputs_go_to_the_working_folder(scan, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert scan("--out", "k.json", "--figure", "k.png")[0] == 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["k.json", "k.png"]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"attn": nn.Linear(6, 6), "mlp": nn.Linear(6, 6)}) for _ in range(2)]
        )
        self.head = nn.Linear(6, 12)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        for layer in self.layers:
            x = layer["mlp"](layer["attn"](x))
        return self.head(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_scanned_profile_serves_the_callback_which_trains_the_names_that_were_printed(
    scan, tmp_path, suffix, decomposed
):
    net = Net()
    net.load_state_dict(state_dict())
    model = tmp_path / f"net.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": net.state_dict(), "epoch": 3, "pytorch-lightning_version": "2.6.0"}, model)
    else:
        save_file(net.state_dict(), model)
    _, out, _ = scan("--names", "--top-p", "0.4", "--out", tmp_path / "kappa.json", model=model)
    decomposed.clear()
    callback = KappaFreezeCallback(top_p=0.4, profile=str(tmp_path / "kappa.json"))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(net, DataLoader(TensorDataset(torch.randn(4, 6)), batch_size=4))
    assert set(callback.trained_names) == set(names_in(out)) == set(RANKING[:2])
    assert decomposed == []


# Errors


@pytest.mark.parametrize("options", [[], ["--names"]])
def test_missing_model_is_an_error_without_a_traceback(scan, tmp_path, options):
    assert_error(scan(*options, model=tmp_path / "missing.safetensors"), "missing.safetensors")


def test_damaged_model_is_an_error_without_a_traceback(scan, checkpoint):
    os.truncate(checkpoint, checkpoint.stat().st_size - 1)
    assert_error(scan(), "w.safetensors", "truncated")


def test_entry_that_is_not_finite_is_an_error_that_names_the_tensor(scan, tmp_path):
    save_file({"a.weight": torch.full((3, 3), float("nan"))}, tmp_path / "n.safetensors")
    assert_error(scan(model=tmp_path / "n.safetensors"), "a.weight", "NaN")


def test_pattern_without_a_match_is_an_error_that_names_it(scan):
    assert_error(scan("--exclude", "decoder.*"), "exclude", "'decoder.*'")


def test_budget_that_selects_nothing_is_an_error(scan):
    assert_error(scan("--max-kappa", "1.5"), "1.5")


@pytest.mark.parametrize("option", ["--out", "--figure"])
def test_missing_folder_of_an_output_is_an_error_before_work_starts(scan, tmp_path, option, decomposed):
    assert_error(scan(option, tmp_path / "no-folder" / "k.png"), "no-folder")
    assert decomposed == []


def test_figure_of_an_unknown_format_is_an_error_before_work_starts(scan, tmp_path, decomposed):
    assert_error(scan("--figure", tmp_path / "k.xyz"), "xyz")
    assert decomposed == []


def test_folder_in_the_place_of_an_output_is_an_error_before_work_starts(scan, tmp_path, decomposed):
    (tmp_path / "taken").mkdir()
    assert_error(scan("--out", tmp_path / "taken"), "taken")
    assert decomposed == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "w.safetensors"]


def test_foreign_file_in_the_place_of_the_journal_is_an_error_and_stays(scan, tmp_path):
    (tmp_path / "k.json.partial").write_text("my notes\n")
    assert_error(scan("--out", tmp_path / "k.json"), "k.json.partial")
    assert (tmp_path / "k.json.partial").read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--top-p", "2"], "top_p"),
        (["--top-p", "0"], "top_p"),
        (["--num-tensors", "0"], "num_tensors"),
        (["--num-tensors", "99"], "num_tensors"),
        (["--max-params", "1.5"], "max_params"),
        (["--rtol", "0"], "rtol"),
    ],
)
def test_value_out_of_range_is_an_error_that_names_it(scan, options, part):
    assert_error(scan(*options), part)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x"])
def test_unknown_device_is_an_error_without_a_traceback(wrong, checkpoint, device):
    assert f"'{device}' is no device" in wrong("scan", checkpoint, "--device", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_device_that_is_not_there_is_an_error_without_a_traceback(wrong, checkpoint):
    assert "has no CUDA" in wrong("scan", checkpoint, "--device", "cuda")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--top-p", "0.2", "--num-tensors", "3"], "not allowed with"),
        (["--max-kappa", "5", "--max-params", "3"], "not allowed with"),
        (["--top-p", "many"], "--top-p"),
        (["--max-params", "many"], "--max-params"),
        (["--num-tensors", "2.5"], "--num-tensors"),
        (["--criterion", "beauty"], "--criterion"),
        (["--within", "layer"], "--within"),
        (["--seed", "x"], "--seed"),
        (["--experts", "min"], "--experts"),
        (["--solver", "qr"], "--solver"),
        (["--memory", "much"], "'much' is no size: write a number of bytes, or 500M, 8G"),
        (["--memory", "0"], "'0' is no size"),
        (["--memory", "-3G"], "--memory"),
        (["--include"], "--include"),
        (["--color"], "--color"),
        (["second-model"], "second-model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_two_and_says_which_argument(wrong, checkpoint, options, part):
    assert part in wrong("scan", checkpoint, *options)


@pytest.mark.parametrize("argv", [[], ["scan"], ["sing", "w.safetensors"]], ids=str)
def test_incomplete_command_line_exits_with_two(wrong, argv):
    wrong(*argv)


def test_help_explains_every_argument(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        main(["scan", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = (
        "--top-p", "--num-tensors", "--max-kappa", "--max-params", "--criterion", "--include", "--exclude",
        "--within", "--seed", "--experts", "--device", "--solver", "--rtol", "--memory", "--out", "--figure", "--names",
    )  # fmt: skip
    for option in options:
        explained = re.search(
            rf"^  {option}\b[^\n]*?\s{{2,}}(\S[^\n]*)|^  {option}\b[^\n]*\n\s{{10,}}(\S.*)", text, re.M
        )
        assert explained, option
    for part in (".safetensors", ".ckpt", "hub", "folder", "--top-p 0.2"):
        assert part in text


def test_help_of_the_command_names_scan(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert re.search(r"^\s+scan\s+\w", capsys.readouterr().out, re.M)


# Interruption


@pytest.fixture
def interrupted(monkeypatch):
    """Presses Ctrl-C at the decomposition after the first ``count``; gives the number of those that ran."""
    original, seen = kappa_lightning.profile.compute.spectrum, []

    def after(count):
        def spectrum(matrix, **options):
            if len(seen) == count:
                raise KeyboardInterrupt
            seen.append(tuple(matrix.shape))
            return original(matrix, **options)

        seen.clear()
        monkeypatch.setattr(kappa_lightning.profile.compute, "spectrum", spectrum)
        return seen

    return after


def test_interrupted_scan_exits_with_130_and_says_how_to_go_on(scan, tmp_path, interrupted):
    interrupted(3)
    status, out, err = scan("--out", tmp_path / "k.json")
    assert (status, out) == (130, "")
    assert "kappa-lightning: interrupted; the same command goes on from there" in err
    assert "Traceback" not in err


def test_interrupted_scan_without_a_file_promises_nothing(scan, interrupted):
    interrupted(1)
    status, out, err = scan()
    assert (status, out) == (130, "")
    assert "kappa-lightning: interrupted" in err
    assert "goes on" not in err


def test_same_command_goes_on_after_an_interruption(scan, tmp_path, interrupted, checkpoint):
    interrupted(3)
    scan("--out", tmp_path / "k.json")
    rest = interrupted(99)
    status, out, _ = scan("--out", tmp_path / "k.json", "--names", "--top-p", "1")
    assert status == 0
    assert len(rest) == 2
    assert names_in(out) == RANKING
    assert KappaProfile.load(tmp_path / "k.json") == KappaProfile.from_checkpoint(checkpoint, progress=False)
    assert not (tmp_path / "k.json.partial").exists()


# The installed command


def command(*argv, **options):
    script = shutil.which("kappa-lightning", path=str(Path(sys.executable).parent))
    assert script, "the package is installed with its console script"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([script, *map(str, argv)], capture_output=True, text=True, env=environment, check=False)


def test_installed_command_scans_a_model_of_the_hub_cache_and_prints_the_names(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    save_file(state_dict(), snapshot / "model.safetensors")
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = command("scan", "org/name", "--names", "--num-tensors", 2, "--out", tmp_path / "k.json", env=environment)
    assert done.stderr.count("error") == 0
    assert (done.returncode, done.stdout) == (0, "\n".join(RANKING[:2]) + "\n")
    assert len(json.loads((tmp_path / "k.json").read_text())["rows"]) == 5


def test_installed_command_fails_with_one_line_and_status_one(tmp_path):
    done = command("scan", tmp_path / "missing.ckpt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kappa-lightning: error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_reader_who_has_seen_enough_is_no_error(checkpoint):
    """As in ``kappa-lightning scan MODEL --names | head``."""
    script = Path(sys.executable).parent / "kappa-lightning"
    process = subprocess.Popen(
        [script, "scan", str(checkpoint), "--names"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert "rror" not in err


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_lack_of_memory_is_an_error_without_a_traceback(scan, monkeypatch, error):
    def full(*arguments, **options):
        raise error("tried to allocate 1 TiB")

    monkeypatch.setattr(kappa_lightning.profile.compute, "spectrum", full)
    assert_error(scan("--device", "cpu"), "out of memory", "tried to allocate 1 TiB")
