"""A checkpoint that lies elsewhere: ``hf://``, ``s3://``, ``https://`` and whatever else fsspec reads, streamed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from kappa_lightning.weights.checkpoint.ranges import read_by_ranges
from kappa_lightning.weights.checkpoint.shards import shards_of_index
from kappa_lightning.weights.checkpoint.stored import Stored, with_quantized_refused

_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")


def is_remote(path: str) -> bool:
    """Whether a path is a URL.

    Example:
        >>> is_remote("hf://org/model"), is_remote("C:/model"), is_remote("org/model")
        (True, False, False)
    """
    return "://" in path


def read_remote(url: str, folder: Path) -> dict[str, Stored]:
    """The tensors of a remote checkpoint; each is downloaded when it is asked for, and nothing but the config is kept.

    Args:
        url: of a ``.safetensors`` file, or of a folder with one or with an index and its shards.
        folder: gets a copy of the ``config.json`` beside them.

    Raises:
        FileNotFoundError: if there is no such file, or a shard is missing.
        ImportError: if fsspec lacks the library for the protocol; the message names it.
        ValueError: if the protocol is unknown, a file is corrupt, or it is not of safetensors.
    """
    import fsspec

    files, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    if root.endswith(".safetensors"):
        tensors = _read_file(files, root)
        beside = root.rpartition("/")[0]
    elif "." in root.rpartition("/")[2] and files.isfile(root):
        raise ValueError(f"{url} is no .safetensors file, and only those can be read from elsewhere: download it first")
    else:
        tensors, beside = _read_folder(files, root, url), root
    config = f"{beside}/config.json"
    if files.exists(config):
        (folder / "config.json").write_bytes(files.cat_file(config))
    return tensors


def _read_folder(files: Any, root: str, url: str) -> dict[str, Stored]:
    for name in _NAMES:
        index = f"{root}/{name}.index.json"
        if files.exists(index):
            shards = shards_of_index(f"{url}/{name}.index.json", files.cat_file(index).decode(errors="replace"))
            return _read_shards(files, root, shards, url)
        if files.exists(f"{root}/{name}"):
            return _read_file(files, f"{root}/{name}")
    raise FileNotFoundError(
        f"{url} has neither {', '.join(_NAMES[:-1])} nor {_NAMES[-1]}, nor an index of their shards: name the "
        ".safetensors file itself, or download the checkpoint first if it is of another kind"
    )


def _read_shards(files: Any, root: str, shards: dict[str, list[str]], url: str) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for shard, names in shards.items():
        held = _read_file(files, f"{root}/{shard}")
        for name in names:
            if name not in held:
                raise ValueError(f"{url}/{shard} lacks {name}, which the index beside it places there")
            tensors[name] = held[name]
    return tensors


def _read_file(files: Any, file: str) -> dict[str, Stored]:
    size = files.info(file)["size"]
    if size is None:
        raise ValueError(f"{file}: the server does not say how large it is, nor read it in parts: download it first")
    return with_quantized_refused(file, read_by_ranges(file, size, partial(_read, files, file)))


def _read(files: Any, file: str, begin: int, stop: int) -> bytes:
    content: bytes = files.cat_file(file, start=begin, end=stop) if stop > begin else b""
    return content
