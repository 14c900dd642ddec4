import json
import math
import os
import pickle
import stat

import pytest
import torch
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.profile import KappaRow


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
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


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
    assert document["schema_version"] == 2
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
    ],
)
def test_row_field_of_a_wrong_type_is_an_error_that_names_the_file(saved, field, value):
    edited(saved, lambda document: document["rows"][1].update({field: value}))
    with pytest.raises(ValueError, match=r"kappa\.json"):
        KappaProfile.load(saved)


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
