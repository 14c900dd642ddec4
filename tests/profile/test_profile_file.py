import contextlib
import json
import math
import os
import pickle
import stat

import pytest
import torch
from saved_profiles import DATA, net_of_version_0_1_0
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.profile import KappaRow
from kappa_lightning.profile.file import checksum


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.good = nn.Linear(4, 3)
        self.zero = nn.Linear(3, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        with torch.no_grad():
            self.zero.weight.zero_()
            self.experts[1] = 0


@pytest.fixture(scope="module")
def profile():
    return KappaProfile.from_model(Fused(), progress=False)


@pytest.fixture
def saved(profile, tmp_path):
    path = tmp_path / "kappa.json"
    profile.save(path)
    return path


def edited(path, change):
    """Changes a saved profile, as if it had been written so."""
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["checksum"]
    change(document)
    path.write_text(json.dumps({**document, "checksum": checksum(document)}), encoding="utf-8")
    return path


def test_edited_files_are_refused_for_what_was_changed_alone(profile, saved):
    assert KappaProfile.load(edited(saved, lambda document: None)) == profile


def test_loading_gives_back_what_was_saved(profile, saved):
    loaded = KappaProfile.load(saved)
    assert loaded == profile
    assert list(loaded) == list(profile)
    assert [type(row) for row in loaded] == [KappaRow] * 3
    assert (loaded.solver, loaded.rtol) == (profile.solver, profile.rtol)
    assert isinstance(loaded["good.weight"].shape, tuple)
    assert isinstance(loaded["experts"].kappas, tuple)
    loaded.check(Fused())


def test_infinities_survive(profile, saved):
    zero = KappaProfile.load(saved)["zero.weight"]
    assert (zero.kappa, zero.log_volume, zero.sigma_min) == (math.inf, -math.inf, 0.0)
    experts = KappaProfile.load(saved)["experts"]
    assert [math.isinf(kappa) for kappa in experts.kappas] == [False, True, False]
    assert experts.kappas == profile["experts"].kappas


def test_every_float_survives_to_the_last_bit(profile, saved):
    for row, loaded in zip(profile, KappaProfile.load(saved), strict=True):
        for field in ("kappa", "sigma_max", "sigma_min", "log_volume", "frobenius_norm", "rtol"):
            assert getattr(row, field).hex() == getattr(loaded, field).hex()


def test_file_is_strict_json_in_utf8(saved):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(saved.read_bytes().decode("utf-8"), parse_constant=refuse)
    assert [row["name"] for row in document["rows"]] == ["experts", "good.weight", "zero.weight"]


def test_file_tells_its_format_schema_and_versions(saved):
    document = json.loads(saved.read_text(encoding="utf-8"))
    assert document["format"] == "kappa-lightning profile"
    assert document["schema_version"] == 3
    assert document["versions"]["torch"] == torch.__version__


def test_unusual_tensor_names_survive(tmp_path):
    net = nn.Module()
    for name in ("größe κ", "inf", "-inf", "null", 'quote"backslash\\'):
        net.register_parameter(name, nn.Parameter(torch.eye(2)))
    profile = KappaProfile.from_model(net, progress=False)
    profile.save(tmp_path / "p.json")
    loaded = KappaProfile.load(tmp_path / "p.json")
    assert [row.name for row in loaded] == [row.name for row in profile]
    assert loaded == profile


def test_paths_may_be_strings_and_an_existing_file_is_replaced(profile, tmp_path):
    path = tmp_path / "p.json"
    path.write_text("old", encoding="utf-8")
    profile.save(str(path))
    assert KappaProfile.load(str(path)) == profile
    assert os.listdir(tmp_path) == ["p.json"]


def test_others_may_read_the_file_as_the_umask_allows(profile, tmp_path):
    before = os.umask(0o022)
    try:
        profile.save(tmp_path / "p.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "p.json").stat().st_mode) == 0o644


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_failed_save_leaves_the_old_file_and_nothing_else(profile, saved, monkeypatch, failing):
    before = saved.read_bytes()

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        profile.restrict(["good.weight"]).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        KappaProfile.load(tmp_path / "none.json")


def test_saving_into_a_folder_that_is_missing_is_a_file_not_found_error(profile, tmp_path):
    with pytest.raises(FileNotFoundError):
        profile.save(tmp_path / "none" / "p.json")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_an_error_that_names_it(saved, share):
    whole = saved.read_bytes().rstrip()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"kappa\.json.*truncated"):
        KappaProfile.load(saved)


@pytest.mark.parametrize("document", ["[]", "3", "null", '"text"', "{}", '{"condition_numbers": {"a": 3.0}}'])
def test_foreign_json_is_an_error_that_names_the_file(tmp_path, document):
    path = tmp_path / "condition_numbers.json"
    path.write_text(document, encoding="utf-8")
    with pytest.raises(ValueError, match=r"condition_numbers\.json.*no profile"):
        KappaProfile.load(path)


def test_file_that_is_not_utf8_is_an_error_that_names_it(saved):
    saved.write_bytes(b"\xff\xfe" + saved.read_bytes())
    with pytest.raises(ValueError, match=r"kappa\.json is no profile"):
        KappaProfile.load(saved)


@pytest.mark.parametrize("version", [1, 99, None, "1"])
def test_other_schema_version_is_an_error_that_says_what_to_do(saved, version):
    edited(saved, lambda document: document.update(schema_version=version))
    with pytest.raises(ValueError, match=rf"kappa\.json has schema version {version}.*update"):
        KappaProfile.load(saved)


@pytest.mark.parametrize("entry", ["rows", "solver", "rtol"])
def test_missing_entry_is_an_error_that_names_file_and_entry(saved, entry):
    edited(saved, lambda document: document.pop(entry))
    with pytest.raises(ValueError, match=rf"kappa\.json.*{entry}"):
        KappaProfile.load(saved)


FIELDS = [
    "name", "shape", "kappa", "sigma_max", "sigma_min", "log_volume", "frobenius_norm", "rtol", "kappas", "dtype",
    "fingerprint", "sigma_maxs", "log_volumes", "frobenius_norms", "matrix_shape", "experts",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_row_without_a_field_is_an_error_that_names_the_file(saved, field):
    edited(saved, lambda document: document["rows"][1].pop(field))
    with pytest.raises(ValueError, match=r"kappa\.json"):
        KappaProfile.load(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("name", None),
        ("shape", 12),
        ("shape", "4x3"),
        ("shape", [4.5, 3]),
        ("kappa", "high"),
        ("kappa", None),
        ("kappa", [1.0]),
        ("kappas", 3.0),
        ("kappas", "inf"),
        ("kappas", ["high"]),
        ("kappas", [1.0]),
        ("sigma_maxs", ["high"]),
        ("log_volumes", 3.0),
        ("matrix_shape", [3]),
        ("matrix_shape", [3.5, 3]),
        ("experts", "min"),
        ("experts", ["mean"]),
        ("fingerprint", 17),
        ("dtype", None),
        ("shape", [True, 12]),
        ("shape", [-4, -3]),
        ("shape", [0, 3]),
        ("shape", [4, 4]),
        ("shape", [10**400, 3]),
        ("matrix_shape", [4, 4]),
        ("matrix_shape", [True, 12]),
        ("kappa", -1.0),
        ("kappa", 0.9),
        ("kappa", 10**400),
        ("kappa", float("nan")),
        ("kappa", True),
        ("kappas", [2.0, 3.0]),
        ("sigma_min", -1.0),
        ("sigma_min", 1e9),
        ("sigma_max", -1.0),
        ("rtol", -1e-3),
        ("frobenius_norm", -1.0),
        ("fingerprint", "nonsense"),
        ("experts", "max"),
    ],
)
def test_row_field_of_a_wrong_type_is_an_error_that_names_the_file(saved, field, value):
    edited(saved, lambda document: document["rows"][1].update({field: value}))
    with pytest.raises(ValueError, match=r"kappa\.json"):
        KappaProfile.load(saved)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"kappa": 7.0}, "is not the mean of its kappas"),
        ({"kappas": [0.5, 2.0, 3.0]}, "κ is below 1"),
        ({"kappas": [2.0, 3.0]}, "different numbers of matrices"),
        ({"kappas": [], "sigma_maxs": [], "log_volumes": [], "frobenius_norms": []}, "different numbers"),
        ({"sigma_maxs": [1.0, -1.0, 2.0]}, "negative"),
        ({"shape": [2, 4, 5]}, r"3 of shape \(4, 5\) do not make up shape=\(2, 4, 5\)"),
    ],
)
def test_stack_that_contradicts_itself_is_an_error_that_says_how(saved, change, part):
    edited(saved, lambda document: document["rows"][0].update(change))
    with pytest.raises(ValueError, match=rf"kappa\.json is a damaged profile: .*'experts'.*{part}"):
        KappaProfile.load(saved)


def test_second_row_of_a_name_is_an_error_that_names_it(saved):
    edited(saved, lambda document: document["rows"].append(document["rows"][1] | {"kappa": 9.0}))
    with pytest.raises(ValueError, match=r"kappa\.json.*two rows .* 'good\.weight'"):
        KappaProfile.load(saved)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("solver", "guess"), ("solver", ["auto"]), ("rtol", 0), ("rtol", -1e-3), ("rtol", "small"), ("rtol", True),
        ("rtol", None), ("rtol", 10**400), ("experts", "min"), ("experts", {}),
    ],
)  # fmt: skip
def test_setting_that_makes_no_sense_is_an_error_that_names_it(saved, entry, value):
    edited(saved, lambda document: document.update({entry: value}))
    with pytest.raises(ValueError, match=rf"kappa\.json is a damaged profile: .*{entry}"):
        KappaProfile.load(saved)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"rows": ' + "[" * 100_000, "1" * 10_000])
def test_json_that_cannot_be_read_is_an_error_that_names_the_file(saved, content):
    saved.write_text(content)
    with pytest.raises(ValueError, match=r"kappa\.json is no profile or a truncated one"):
        KappaProfile.load(saved)


def test_no_flipped_bit_changes_a_profile_silently(profile, saved):
    content = saved.read_bytes()
    silent = []
    for bit in range(0, 8 * len(content), 23):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            silent.append(KappaProfile.load(saved))
    # Between two tokens a blank may become another blank.
    assert all(loaded == profile for loaded in silent)
    assert len(silent) < len(content) / 100


def test_profile_of_version_0_1_0_loads_and_is_that_of_its_model():
    loaded = KappaProfile.load(DATA / "profile-0.1.0.json")
    assert (loaded.solver, loaded.rtol, loaded.experts) == ("auto", 1e-4, "median")
    net = net_of_version_0_1_0()
    loaded.check(net)
    computed = KappaProfile.from_model(net, progress=False, rtol=1e-4, experts="median")
    assert [row.name for row in loaded] == [row.name for row in computed]
    for row in loaded:
        assert row.kappa == pytest.approx(computed[row.name].kappa, rel=1e-4)
        assert row.kappas == (computed[row.name].kappas and pytest.approx(computed[row.name].kappas, rel=1e-4))


@pytest.mark.parametrize("rows", [3, None, "rows", {"a": 1}, [3], [None], [["name", "a"]]], ids=str)
def test_rows_of_another_form_are_an_error_that_names_the_file(saved, rows):
    edited(saved, lambda document: document.update(rows=rows))
    with pytest.raises(ValueError, match=r"kappa\.json"):
        KappaProfile.load(saved)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was unpickled",)


def test_pickle_is_refused_and_never_unpickled(tmp_path):
    pickled = tmp_path / "kappa.json"
    pickled.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"kappa\.json"):
        KappaProfile.load(pickled)
    torch.save({"rows": Bomb()}, pickled)
    with pytest.raises(ValueError, match=r"kappa\.json"):
        KappaProfile.load(pickled)
