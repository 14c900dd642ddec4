"""Which files a checkpoint consists of."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from kappa_lightning.weights.checkpoint.mxfp4 import with_mxfp4_dequantized
from kappa_lightning.weights.checkpoint.pickle_file import read_pickle
from kappa_lightning.weights.checkpoint.safetensors_file import read_safetensors
from kappa_lightning.weights.checkpoint.shards import shards_of_index
from kappa_lightning.weights.checkpoint.stored import Stored

_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# What training leaves in a folder beside the weights.
_OTHERS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "random_states")
_LORA = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))(\.weight)?$")
_FOREIGN = {
    ".gguf": "load it with transformers (from_pretrained with gguf_file=) and use KappaProfile.from_model",
    ".onnx": "use the PyTorch weights that it was exported from",
    ".h5": "load it with the library that wrote it and use KappaProfile.from_model",
    ".msgpack": "load it with transformers (from_flax=True) and use KappaProfile.from_model",
}


def find_source(path: str | os.PathLike[str]) -> Path:
    """The file or folder that a path names, or the folder of a hub model in the local cache.

    Raises:
        FileNotFoundError: if there is none.
    """
    source = Path(path)
    return source if source.exists() else _cached(str(path))


def read_files(source: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, from whatever files it consists of; experts in MXFP4 are read dequantized.

    Raises:
        FileNotFoundError: if a folder holds no weights, or a shard is missing.
        ValueError: if a file is corrupt or of an unknown kind, or an index does not fit its shards.
    """
    return with_mxfp4_dequantized(_read_all(source))


def _read_all(source: Path) -> dict[str, Stored]:
    if not source.is_dir():
        return _read_file(source)
    for name in _NAMES:
        index = source / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    for name in _NAMES:
        if (source / name).is_file():
            return _read_file(source / name)
    return _read_file(_only_file(source))


def _read_file(file: Path, *, shard: bool = False) -> dict[str, Stored]:
    if file.suffix in _FOREIGN:
        raise ValueError(f"{file} is no file of PyTorch's: {_FOREIGN[file.suffix]}")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, shard=shard)
    return _by_loaded_names(tensors) if file.stem == "adapter_model" else tensors


def _by_loaded_names(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of an adapter of PEFT, which stores them without its name and loads them as the adapter "default"."""
    names = {name: _LORA.sub(r"\1.default\2", name) for name in tensors}
    return {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}


def _read_shards(index: Path) -> dict[str, Stored]:
    shards = shards_of_index(str(index), index.read_bytes().decode(errors="replace"))
    tensors: dict[str, Stored] = {}
    for shard, names in shards.items():
        file = index.parent / shard
        if not file.is_file():
            raise FileNotFoundError(
                f"{index} names the shard {shard} for {names[0]}, which is not there: download it again"
            )
        held = _read_file(file, shard=True)
        for name in names:
            if name not in held:
                raise ValueError(
                    f"{file} lacks {name}, which {index.name} beside it places there: one of the two is damaged or of "
                    "another model, so download both again"
                )
            tensors[name] = held[name]
    return tensors


def _only_file(folder: Path) -> Path:
    """The one file of weights in a folder of somebody's own making."""
    if (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is a distributed checkpoint, {_how_to_consolidate(folder)}")
    if (folder / "zero_to_fp32.py").is_file():
        raise ValueError(
            f"{folder} is a checkpoint of DeepSpeed: put it together with python {folder / 'zero_to_fp32.py'} {folder} "
            "weights.pt, and name that file"
        )
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is a pipeline of several models: name the folder of one, such as {folder / 'unet'}")
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith(_OTHERS))
    if len(files) == 1 and files[0].is_file():
        return files[0]
    found = f"; it holds {', '.join(file.name for file in files[:5])}{', …' if len(files) > 5 else ''}" if files else ""
    raise FileNotFoundError(
        f"{folder} has neither {', '.join(_NAMES[:-1])} nor {_NAMES[-1]}, nor an index of their shards{found}: "
        "name the checkpoint file itself"
    )


def _how_to_consolidate(folder: Path) -> str:
    """What to do with a folder whose index is a pickle that would run code."""
    command = (
        f"python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}"
        if (folder / "meta.pt").is_file()
        else f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
    )
    return f"whose index cannot be read without running its code: put it together with {command}, and name that file"


def _cached(model_id: str) -> Path:
    missing = f"{model_id} is no file, no folder and no model in the local hub cache"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(f"{missing} (huggingface_hub is not installed)") from error
    try:
        return Path(snapshot_download(model_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{missing}: give a path, or download it first") from error
