"""Damaged and hostile checkpoints end in a ValueError that names the file, not in a crash or in code that runs."""

import io
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.weights import checkpoint_weights
from kappa_lightning.weights.checkpoint import pickle_file


def scan(path, **options):
    return KappaProfile.from_checkpoint(path, progress=False, **options)


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))


def kappas(profile):
    return {row.name: row.kappa for row in profile}


def repacked(file, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The zip archive anew, with its members changed or compressed."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, change(name, data))


def pickled(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


PICKLES = {
    "struct.error": pickled(b"G\x00"),  # a float of which one byte is there
    "KeyError": pickled(b"h\x05"),  # fetches what was never stored
    "IndexError": pickled(b"0"),  # pops from an empty stack
    "AssertionError": pickled(b"Q"),  # a persistent id that is none
    "no-tuple": pickled(b"X\x01\x00\x00\x00a", b"Q"),
    "unknown-storage": pickled(b"(", b"X\x04\x00\x00\x00cuda", b"t", b"Q"),
    "reduce-of-nothing": pickled(b")R"),
    "build-of-nothing": pickled(b"N}b"),
    "endless-text": pickled(b"X\xff\xff\xff\x7fa"),
    "too-large": pickled(b"\x8a\xff" + b"\x01" * 255),
    "set-items": pickled(b"K\x01K\x02K\x03s"),
    "empty": b"",
    "text": b"weights",
}


@pytest.mark.parametrize("form", ["zip", "bare"])
@pytest.mark.parametrize("kind", PICKLES)
def test_damaged_pickle_is_an_error_that_names_the_file(kind, form, tmp_path):
    file = tmp_path / "broken.ckpt"
    if form == "zip":
        torch.save(network().state_dict(), file)
        repacked(file, lambda name, data: PICKLES[kind] if name.endswith("data.pkl") else data)
    else:
        file.write_bytes(PICKLES[kind])
    with pytest.raises(ValueError, match=r"broken\.ckpt (is|holds) no "):
        scan(file)


def test_every_flipped_byte_of_a_small_pickle_is_read_or_refused(tmp_path):
    file = tmp_path / "flipped.pt"
    torch.save({"a.weight": torch.eye(2)}, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    refusals = []
    for place in range(0, len(content), 2):
        damaged = bytearray(content)
        damaged[place] ^= 0x15
        torch.save({"a.weight": torch.eye(2)}, file)
        repacked(file, lambda member, data: bytes(damaged) if member == name else data)  # noqa: B023
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                scan(file)
            except ValueError as error:
                refusals.append(str(error))
    assert len(refusals) > 20
    assert all("flipped.pt" in refusal or "NaN or infinite" in refusal for refusal in refusals)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_compressed_members_are_not_mapped(compression, tmp_path):
    net = network()
    file = tmp_path / "small.ckpt"
    torch.save(net.state_dict(), file)
    expected = kappas(scan(file))
    repacked(file, compression=compression)
    assert kappas(scan(file)) == expected


def test_archive_that_unpacks_to_more_than_there_is_memory_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "bomb.ckpt"
    torch.save({"a.weight": torch.zeros(300, 300)}, file)
    repacked(file, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(pickle_file, "_physical_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"bomb\.ckpt is compressed and unpacks to \d{6} bytes, more than .* 100000"):
        scan(file)


SIDE = 400_000


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(SIDE, SIDE), torch.zeros(2 * SIDE).as_strided((SIDE, SIDE), (1, 1))],
    ids=["expanded", "overlapping"],
)
def test_tensor_that_stands_for_more_than_is_stored_is_refused_unless_it_is_excluded(tensor, tmp_path):
    file = tmp_path / "bomb.pt"
    torch.save({"bomb.weight": tensor, "a.weight": torch.eye(3)}, file)
    assert file.stat().st_size < 8_000_000
    with pytest.raises(ValueError, match=r"bomb\.weight in .*bomb\.pt has shape \(400000, 400000\), expanded from"):
        scan(file)
    assert kappas(scan(file, exclude=["bomb.*"])) == {"a.weight": 1.0}


def test_small_expanded_weight_is_read_as_it_is(tmp_path):
    torch.save({"a.weight": torch.ones(1, 3).expand(4, 3)}, tmp_path / "w.pt")
    assert kappas(scan(tmp_path / "w.pt")) == {"a.weight": np.inf}


def unusual(kind):
    if kind == "nested":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    if kind == "meta":
        return torch.empty(3, 3, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"sparse_coo": torch.eye(3).to_sparse(), "sparse_csr": torch.eye(3).to_sparse_csr()}[kind]


@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested", "meta"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensor_of_another_kind_is_refused_by_name_unless_it_is_excluded(kind, tmp_path):
    torch.save({"odd.weight": unusual(kind), "a.weight": torch.eye(3)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"odd\.weight in .*w\.pt (is a|was saved on the) {kind} (tensor|device)"):
        scan(tmp_path / "w.pt")
    assert kappas(scan(tmp_path / "w.pt", exclude=["odd.*"])) == {"a.weight": 1.0}


def test_weight_that_does_not_fit_into_memory_is_an_error_that_names_it(tmp_path, monkeypatch):
    torch.save(network().state_dict(), tmp_path / "w.pt")
    weights = checkpoint_weights(tmp_path / "w.pt")

    def clone(tensor):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with pytest.raises(ValueError, match=r"0\.weight in .*w\.pt, of 120 bytes, does not fit into memory"):
        weights[0].read()


WRITERS = {"safetensors": save_file, "pt": torch.save}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("how", ["replaced", "cut", "deleted", "grown"])
def test_file_that_changes_while_it_is_read_is_noticed(how, suffix, tmp_path):
    file = tmp_path / f"w.{suffix}"
    WRITERS[suffix](network().state_dict(), file)
    weights = checkpoint_weights(file)
    weights[0].read()
    if how == "replaced":
        WRITERS[suffix](network().state_dict(), tmp_path / "new")
        os.replace(tmp_path / "new", file)
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "deleted":
        file.unlink()
    else:
        with file.open("ab") as appended:
            appended.write(b"more")
    with pytest.raises(ValueError, match=rf"w\.{suffix} was changed while it was read"):
        weights[1].read()


def test_what_was_read_stays_when_the_file_goes(tmp_path):
    file = tmp_path / "w.pt"
    net = network()
    torch.save(net.state_dict(), file)
    tensor = checkpoint_weights(file)[0].read()
    os.truncate(file, 0)
    assert torch.equal(tensor, net[0].weight)


@pytest.mark.parametrize("suffix", WRITERS)
def test_default_device_does_not_matter(suffix, tmp_path):
    net = network()
    WRITERS[suffix](net.state_dict(), tmp_path / f"w.{suffix}")
    expected = KappaProfile.from_model(net, progress=False)
    torch.set_default_device("meta")
    try:
        profile = scan(tmp_path / f"w.{suffix}")
        of_model = KappaProfile.from_model(net, progress=False)
    finally:
        torch.set_default_device(None)
    assert profile == of_model == expected


def test_file_is_opened_once_however_many_tensors_it_has(tmp_path, monkeypatch):
    opened = []
    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **kw: opened.append(args) or original(*args, **kw))
    save_file({f"{i}.weight": torch.eye(4) for i in range(50)}, tmp_path / "w.safetensors")
    assert len(scan(tmp_path / "w.safetensors")) == 50
    assert len(opened) == 1


def test_malformed_header_of_safetensors_is_an_error_that_names_the_file(tmp_path):
    file = tmp_path / "w.safetensors"
    for header in (b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"\xff"):
        file.write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 4)
        with pytest.raises(ValueError, match=r"w\.safetensors is corrupt or truncated"):
            scan(file)
    file.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(ValueError, match=r"w\.safetensors is corrupt or truncated"):
        scan(file)


def test_plain_pickle_of_a_state_dict_is_refused_without_running_it(tmp_path):
    buffer = io.BytesIO()
    pickle.dump({"a.weight": np.eye(3)}, buffer)
    (tmp_path / "w.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"w\.pkl"):
        scan(tmp_path / "w.pkl")
