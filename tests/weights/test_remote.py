"""Checkpoints that lie elsewhere are streamed tensor by tensor, whatever fsspec reads them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from mixtures import build
from safetensors.torch import save_file

import kappa_lightning.weights.checkpoint.safetensors_file
from kappa_lightning import KappaProfile
from kappa_lightning.cli import main
from kappa_lightning.weights import checkpoint_weights
from kappa_lightning.weights.checkpoint.ranges import read_by_ranges


@pytest.fixture
def bucket() -> Any:
    """A file system in memory, which every process has one of."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def upload(files: Any, folder: Path, to: str) -> None:
    for file in folder.iterdir():
        files.pipe_file(f"{to}/{file.name}", file.read_bytes())


def of(path: Any) -> list[Any]:
    return [row.to_dict() for row in KappaProfile.from_checkpoint(path, progress=False, experts="each")]


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_a_remote_model_has_the_rows_of_the_local_one(tmp_path: Path, bucket: Any, shards: str | None) -> None:
    build("Mixtral").save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    upload(bucket, tmp_path, "/models/mixtral")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if shards is None else 2
    assert of("memory://models/mixtral") == of(tmp_path)
    assert of("memory://models/mixtral/") == of(tmp_path)


def test_only_what_is_asked_for_is_downloaded(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{i}.weight": torch.randn(64, 64) for i in range(10)}
    save_file(tensors, tmp_path / "w.safetensors")
    upload(bucket, tmp_path, "/one")
    read: list[int] = []
    real = type(bucket).cat_file

    def counting(self: Any, path: str, start: Any = None, end: Any = None, **named: Any) -> bytes:
        content: bytes = real(self, path, start, end, **named)
        read.append(len(content))
        return content

    monkeypatch.setattr(type(bucket), "cat_file", counting)
    weights = checkpoint_weights("memory://one/w.safetensors")
    assert sum(read) < 2000
    assert torch.equal(weights[3].read(), tensors["3.weight"])
    assert read[-1] == 64 * 64 * 4
    assert sum(read) < 2000 + 64 * 64 * 4


def test_a_scan_of_a_url_prints_and_saves(tmp_path: Path, bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 4)}, tmp_path / "w.safetensors")
    upload(bucket, tmp_path, "/one")
    out = tmp_path / "kappa.json"
    assert main(["scan", "memory://one/w.safetensors", "--num-tensors", "1", "--names", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["b.weight"]
    assert [row.name for row in KappaProfile.load(out)] == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    ("content", "url", "error", "message"),
    [
        ({}, "memory://nothing", FileNotFoundError, "memory://nothing has neither model.safetensors"),
        ({"/m/w.bin": b"x"}, "memory://m/w.bin", ValueError, "download it first"),
        (
            {"/m/w.safetensors": b"\x01"},
            "memory://m/w.safetensors",
            ValueError,
            "w.safetensors is corrupt or truncated",
        ),
        ({}, "nowhere://a/b", ValueError, "nowhere"),
        (
            {"/m/model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
            "memory://m",
            ValueError,
            "does not lie beside it",
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    bucket: Any, content: dict[str, bytes], url: str, error: type[Exception], message: str
) -> None:
    for path, data in content.items():
        bucket.pipe_file(path, data)
    with pytest.raises(error, match=message):
        checkpoint_weights(url)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (1 << 62).to_bytes(8, "little"),
        header(a=A),  # no values
        header(a=A) + bytes(9),
        header(a={**A, "shape": [3]}) + bytes(8),
        header(a={**A, "data_offsets": [4, 12]}) + bytes(12),
        header(a=A, b=A) + bytes(8),
        header(a={"dtype": "F32"}) + bytes(8),
        header(a={**A, "shape": [-2]}) + bytes(8),
    ],
)
def test_a_damaged_header_is_an_error_that_names_the_file(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"w\.safetensors is corrupt or truncated"):
        read_by_ranges("w.safetensors", len(content), lambda begin, end: content[begin:end])


def test_a_file_larger_than_memory_is_read_by_ranges_and_noticed_if_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "a.weight": torch.randn(5, 7),
        "b.weight": torch.randn(4, 3).bfloat16(),
        "c.weight": torch.randn(2, 3, dtype=torch.float64),
    }
    file = tmp_path / "w.safetensors"
    save_file(tensors, file)
    expected = of(file)
    monkeypatch.setattr(kappa_lightning.weights.checkpoint.safetensors_file, "_physical_memory", lambda: 10)
    assert of(file) == expected
    weights = checkpoint_weights(file)
    assert all(torch.equal(weight.read(), tensors[weight.name]) for weight in weights)
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="was changed while it was read"):
        weights[0].read()
