import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from saved_profiles import DATA, net_of_version_0_1_0
from torch import nn

import kappa_lightning.profile.compute
from kappa_lightning import KappaProfile
from kappa_lightning.profile.file import checksum


class Interruption(Exception):
    """Whatever ends a pass in its middle."""


class Steps:
    """Counts the decompositions, and raises after ``limit`` of them."""

    def __init__(self, original):
        self.original = original
        self.limit = None
        self.error = Interruption
        self.shapes = []

    def __call__(self, matrix, **options):
        if self.limit is not None and len(self.shapes) >= self.limit:
            raise self.error
        self.shapes.append(tuple(matrix.shape[-2:]))
        return self.original(matrix, **options)

    def restart(self, limit=None):
        self.shapes, self.limit = [], limit


@pytest.fixture
def steps(monkeypatch):
    counter = Steps(kappa_lightning.profile.compute.spectrum)
    monkeypatch.setattr(kappa_lightning.profile.compute, "spectrum", counter)
    return counter


SHAPES = [(2, 9), (3, 8), (4, 7), (5, 6), (6, 6)]


@pytest.fixture
def net():
    torch.manual_seed(3)
    return nn.ModuleList([nn.Linear(cols, rows) for rows, cols in SHAPES])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "kappa.json"


@pytest.fixture
def partial(tmp_path):
    return tmp_path / "kappa.json.partial"


def profile_of(net, out, **options):
    return KappaProfile.from_model(net, progress=False, save_to=out, **options)


def interrupt(net, out, steps, after, **options):
    steps.restart(limit=after)
    with pytest.raises(steps.error):
        profile_of(net, out, **options)
    steps.restart()


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_interrupted_pass_goes_on_with_only_the_rest(net, out, partial, steps, done):
    interrupt(net, out, steps, after=done)
    assert partial.exists()
    assert not out.exists()
    profile_of(net, out)
    assert steps.shapes == SHAPES[done:]


def test_resumed_profile_and_its_file_equal_those_of_an_uninterrupted_pass(net, out, tmp_path, steps):
    with torch.no_grad():
        net[1].weight[0] = 2 * net[1].weight[2]  # κ = ∞, which JSON cannot hold as a number
    whole = profile_of(net, tmp_path / "whole.json")
    interrupt(net, out, steps, after=3)
    resumed = profile_of(net, out)
    assert resumed == whole
    assert [row.name for row in resumed] == [f"{index}.weight" for index in range(5)]
    assert resumed["1.weight"].kappa == float("inf")
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_pass_may_be_interrupted_again_and_again(net, out, steps):
    seen = []
    for _ in range(4):
        steps.restart(limit=1)
        with pytest.raises(Interruption):
            profile_of(net, out)
        seen += steps.shapes
    steps.restart()
    profile_of(net, out)
    assert seen + steps.shapes == SHAPES


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_any_kind_of_interruption_keeps_what_was_done(net, out, steps, error):
    steps.error = error
    interrupt(net, out, steps, after=2)
    profile_of(net, out)
    assert steps.shapes == SHAPES[2:]


def test_experts_survive_an_interruption_with_a_kappa_each(out, steps):
    net = nn.ParameterDict({"experts": torch.randn(3, 4, 5), "last": torch.randn(4, 4)})
    interrupt(net, out, steps, after=1, experts="median")
    resumed = profile_of(net, out, experts="median")
    assert len(resumed["experts"].kappas) == 3
    assert resumed == KappaProfile.from_model(net, progress=False, experts="median")


def test_journal_is_removed_when_the_profile_is_saved(net, out, tmp_path, steps):
    interrupt(net, out, steps, after=2)
    profile_of(net, out)
    assert [path.name for path in tmp_path.iterdir()] == ["kappa.json"]
    assert len(KappaProfile.load(out)) == 5


def test_journal_stays_if_the_profile_cannot_be_saved(net, out, partial, steps, monkeypatch):
    with monkeypatch.context() as context:
        replace = os.replace
        context.setattr("os.replace", lambda old, new: _disk_full() if new == out else replace(old, new))
        with pytest.raises(OSError, match=r"disk full"):
            profile_of(net, out)
    assert partial.exists()
    steps.restart()
    profile_of(net, out)
    assert steps.shapes == []
    assert not partial.exists()


def _disk_full():
    raise OSError("disk full")


def test_without_a_file_no_journal_is_kept(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    KappaProfile.from_model(net, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [{"rtol": 1e-6}, {"solver": "svd"}, {"experts": "max"}], ids=str)
def test_other_settings_start_anew(net, out, steps, other):
    interrupt(net, out, steps, after=3)
    profile = profile_of(net, out, **other)
    assert steps.shapes == SHAPES
    assert profile == KappaProfile.from_model(net, progress=False, **other)


def test_other_patterns_use_what_was_done(net, out, steps):
    interrupt(net, out, steps, after=3)
    profile = profile_of(net, out, include=["[1-4].*"])
    assert steps.shapes == SHAPES[3:]
    assert [row.name for row in profile] == ["1.weight", "2.weight", "3.weight", "4.weight"]


def test_weights_that_changed_meanwhile_are_decomposed_again(net, out, steps):
    interrupt(net, out, steps, after=3)
    with torch.no_grad():
        net[1].weight[0, 0] += 1e-3
    profile = profile_of(net, out)
    assert steps.shapes == [SHAPES[1], *SHAPES[3:]]
    assert profile == KappaProfile.from_model(net, progress=False)
    profile.check(net)


def test_equal_content_under_another_name_is_not_mistaken(net, out, steps):
    interrupt(net, out, steps, after=3)
    renamed = nn.ModuleDict({f"layer{index}": layer for index, layer in enumerate(net)})
    profile = profile_of(renamed, out)
    assert steps.shapes == SHAPES
    assert [row.name for row in profile] == [f"layer{index}.weight" for index in range(5)]


@pytest.mark.parametrize("kept", [1, 20, 200, -1, -2])
def test_line_at_which_the_interruption_came_is_dropped(net, out, partial, steps, kept):
    interrupt(net, out, steps, after=3)
    *complete, last = partial.read_text().splitlines()
    partial.write_text("\n".join([*complete, last[:kept]]))
    resumed = profile_of(net, out)
    assert steps.shapes == SHAPES[2:]
    assert resumed == KappaProfile.from_model(net, progress=False)


def test_what_is_appended_never_continues_a_line_that_was_cut_off(net, out, partial, steps):
    interrupt(net, out, steps, after=3)
    partial.write_text(partial.read_text()[:-30])
    interrupt(net, out, steps, after=1)  # does the third again
    profile_of(net, out)
    assert steps.shapes == SHAPES[3:]


def test_line_cut_off_within_a_letter_is_dropped(out, partial, steps):
    net = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("a", "β", "c")})
    interrupt(net, out, steps, after=2)
    content = partial.read_bytes()
    partial.write_bytes(content[: content.rindex(b'"name"') + 10] + b"\xce")
    profile_of(net, out)
    assert len(steps.shapes) == 2


def test_header_that_was_cut_off_starts_anew(net, out, partial, steps):
    interrupt(net, out, steps, after=0)
    partial.write_text("")
    profile_of(net, out)
    assert steps.shapes == SHAPES


HEADER = '{"format": "kappa-lightning journal"'


@pytest.mark.parametrize("first", [None, "", HEADER[:7], HEADER, "\0" * 200])
def test_journal_that_has_lost_its_header_is_started_anew(net, out, partial, steps, first):
    interrupt(net, out, steps, after=3)
    rest = partial.read_text().split("\n", 1)[1]
    partial.write_text(rest if first is None else f"{first}\n{rest}")
    profile_of(net, out)
    assert steps.shapes == SHAPES
    assert not partial.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace('"kappa": ', '"kappa": 1'),
        lambda line: "[" * 100_000,
        lambda line: line.replace('"kappa": ', f'"kappa": {10**400}'),
        lambda line: line[:50],
        lambda line: "\0" * 100,
        lambda line: line.replace('"experts": "mean"', '"experts": "max"'),
    ],
)
def test_damaged_line_costs_its_row_alone(net, out, partial, steps, damage):
    interrupt(net, out, steps, after=3)
    lines = partial.read_text().splitlines()
    assert damage(lines[2]) != lines[2]
    lines[2] = damage(lines[2])
    partial.write_text("\n".join(lines) + "\n")
    resumed = profile_of(net, out)
    assert steps.shapes == [SHAPES[1], *SHAPES[3:]]
    assert resumed == KappaProfile.from_model(net, progress=False)


def test_row_of_other_settings_is_computed_again_though_its_checksum_fits(net, out, partial, steps):
    interrupt(net, out, steps, after=2)
    lines = partial.read_text().splitlines()
    entry = json.loads(lines[1])["row"] | {"experts": "max"}
    lines[1] = json.dumps({"row": entry, "checksum": checksum(entry)})
    partial.write_text("\n".join(lines) + "\n")
    assert profile_of(net, out) == KappaProfile.from_model(net, progress=False)


OTHER = """
import sys
from kappa_lightning.profile.journal import Journal
from kappa_lightning.profile.settings import ProfileSettings
with Journal(sys.argv[1], ProfileSettings()):
    print("there", flush=True)
    sys.stdin.read()
"""


def test_file_that_another_process_profiles_to_is_refused_and_left_alone(net, out, partial, steps):
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"there\n"
        before = partial.read_bytes()
        with pytest.raises(BlockingIOError, match=r"another process is profiling .*kappa\.json\.partial"):
            profile_of(net, out)
        assert partial.read_bytes() == before
        assert steps.shapes == []
        other.communicate()
    profile_of(net, out)
    assert steps.shapes == SHAPES


def test_rows_of_version_0_1_0_are_taken_over(out, partial, steps):
    shutil.copy(DATA / "journal-0.1.0.partial", partial)
    net = net_of_version_0_1_0()
    profile = profile_of(net, out, experts="median", rtol=1e-4)
    assert steps.shapes == [(3, 3)]
    assert profile == KappaProfile.load(DATA / "profile-0.1.0.json")


@pytest.mark.parametrize("content", ["my notes\n", '{"format": "kappa-lightning profile"}\n', "[1, 2]\n"])
def test_foreign_file_in_its_place_is_refused_and_left_alone(net, out, partial, steps, content):
    partial.write_text(content)
    with pytest.raises(ValueError, match=r"kappa\.json\.partial is no journal"):
        profile_of(net, out)
    assert partial.read_text() == content
    assert steps.shapes == []


def test_every_line_of_a_journal_is_strict_json(net, out, partial, steps):
    with torch.no_grad():
        net[0].weight.zero_()
    interrupt(net, out, steps, after=2)
    lines = partial.read_text().splitlines()
    rows = [json.loads(line, parse_constant=_no_constant) for line in lines[1:]]
    assert [row["row"]["name"] for row in rows] == ["0.weight", "1.weight"]


def _no_constant(text):
    raise AssertionError(f"{text} is no JSON")


def test_interrupted_pass_over_a_checkpoint_goes_on_too(net, out, tmp_path, steps):
    torch.save(net.state_dict(), tmp_path / "w.pt")
    steps.restart(limit=2)
    with pytest.raises(Interruption):
        KappaProfile.from_checkpoint(tmp_path / "w.pt", progress=False, save_to=out)
    steps.restart()
    profile = KappaProfile.from_checkpoint(tmp_path / "w.pt", progress=False, save_to=out)
    assert steps.shapes == SHAPES[2:]
    profile.check(net)


def test_missing_folder_of_the_file_is_an_error_before_anything_is_decomposed(net, tmp_path, steps):
    with pytest.raises(FileNotFoundError, match=r"no-folder"):
        profile_of(net, tmp_path / "no-folder" / "kappa.json")
    assert steps.shapes == []


def test_weight_that_is_not_finite_keeps_what_was_done_before_it(net, out, steps):
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"3\.weight"):
        profile_of(net, out)
    steps.restart()
    with torch.no_grad():
        net[3].weight[0, 0] = 1.0
    profile_of(net, out)
    assert steps.shapes == SHAPES[3:]
