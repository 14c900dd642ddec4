"""The weight matrices of a checkpoint, read from disk one tensor at a time."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.weight import Weight, as_convolution, is_matrix_shape, view_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def checkpoint_weights(path: str | os.PathLike[str]) -> list[Weight]:
    """The matrices of a checkpoint; only names and shapes are read until a weight is asked for.

    A tensor of three dimensions is taken for a stack of matrices, such as fused experts, unless its name says that it
    belongs to a convolution; the layout of transposed convolutions cannot be told from a file and is read as stored.

    Args:
        path: a ``.safetensors`` file; a folder with ``model.safetensors``, or with an index and its shards; a
            Lightning ``.ckpt`` or a plain ``state_dict`` file, read without unpickling code; or the id of a hub model
            that is in the local cache.

    Raises:
        FileNotFoundError: if there is no such file and no such model in the cache, or a shard is missing.
        ValueError: if the file is corrupt, of an unknown kind, holds no matrix, or holds quantized weights, or a shard
            lacks a tensor that the index places there.
    """
    source = Path(path)
    if source.is_dir():
        weights = list(_from_folder(source))
    elif source.is_file():
        weights = list(_from_file(source))
    else:
        weights = list(_from_folder(_cached(str(path))))
    if not weights:
        raise ValueError(f"{path} holds no weight matrix")
    return weights


def _from_folder(folder: Path) -> Iterator[Weight]:
    index = folder / _INDEX
    if index.is_file():
        try:
            places = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors shards, or a damaged one: {error!r}") from error
        shards: dict[str, list[str]] = {}
        for name, shard in places:
            if not isinstance(shard, str):
                raise ValueError(f"{index} is a damaged index: it names {shard!r} as the shard of {name}")
            shards.setdefault(shard, []).append(name)
        for shard, names in shards.items():
            if not (folder / shard).is_file():
                raise FileNotFoundError(
                    f"{index} names the shard {shard} for {names[0]}, which is not there: download it again"
                )
            yield from _from_safetensors(folder / shard, expected=names)
    elif (folder / _SINGLE).is_file():
        yield from _from_safetensors(folder / _SINGLE)
    else:
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}: name the checkpoint file itself")


def _from_file(file: Path) -> Iterator[Weight]:
    return _from_safetensors(file) if file.suffix == ".safetensors" else _from_pickle(file)


def _from_safetensors(file: Path, expected: Sequence[str] = ()) -> Iterator[Weight]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> Tensor:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)  # type: ignore[no-any-return]

    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            described = [(name, tuple(s.get_shape()), _DTYPES.get(s.get_dtype())) for name, s in slices.items()]
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}): download it again") from error
    names = set(slices)
    for name in expected:
        if name not in names:
            raise ValueError(
                f"{file} lacks {name}, which {_INDEX} beside it places there: one of the two is damaged or of another "
                "model, so download both again"
            )
    for name, shape, dtype in described:
        yield from _weight(file, name, shape, dtype, partial(read, name), names)


def _from_pickle(file: Path) -> Iterator[Weight]:
    try:
        # Mapped, not loaded: a tensor's bytes are read when it is.
        mapped = zipfile.is_zipfile(file)  # what torch.save writes since version 1.6; older files must be loaded
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no checkpoint, a truncated one, or one that cannot be read without running its code: save its "
            "state_dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is no checkpoint, or a truncated one ({reason}): download it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} holds no state_dict of named tensors")
    names, seen = set(state), set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue  # a tied weight, which stands under its first name
        seen.add(place)
        yield from _weight(file, name, tuple(tensor.shape), tensor.dtype, tensor.detach, names)


def _weight(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    read: Callable[[], Tensor],
    names: set[str],
) -> Iterator[Weight]:
    if _is_quantized(name, shape, dtype, names):
        raise ValueError(
            f"{name} in {file} is stored as {dtype or 'an unknown type'}, quantized: load the model with its library "
            "and use KappaProfile.from_model"
        )
    # A weight of two dimensions is a Linear's or an Embedding's, even if one of them is 1.
    is_matrix = is_matrix_shape(name, shape) or (len(shape) == 2 and name.endswith(".weight"))
    if dtype is None or not dtype.is_floating_point or not is_matrix:
        return
    view = as_convolution if len(shape) == 3 and "conv" in name.lower() else view_of(shape)
    yield Weight(plain_name(name), shape, dtype, read, view)


def _is_quantized(name: str, shape: tuple[int, ...], dtype: torch.dtype | None, names: set[str]) -> bool:
    """Whether a tensor holds codes: 8-bit integers, an integer weight, or numbers with a scale of their own."""
    if len(shape) < 2 or dtype in (torch.bool, torch.complex64, torch.complex128):
        return False
    if dtype is None or not dtype.is_floating_point:
        return dtype is None or dtype.itemsize == 1 or name.endswith("weight")
    return dtype.itemsize == 1 and any(f"{name}{end}" in names for end in ("_scale_inv", "_scale"))


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


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
