"""The tensors of a file of ``torch.save``, read without running code."""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.weights.checkpoint.stored import Stored, UnchangedFile, with_quantized_refused

# What unpickling raises where bytes are damaged: nearly anything, but nothing that this package raises itself.
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError, TypeError, LookupError,
    AttributeError, AssertionError, ArithmeticError, RuntimeError, MemoryError, ImportError,
)  # fmt: skip
_REFUSED = re.compile(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.<>]+)")
# A tensor that stands for more numbers than are stored, such as one that was expanded, may be this large.
_LARGEST_EXPANDED = 1 << 24


def read_pickle(file: Path, *, shard: bool = False) -> dict[str, Stored]:
    """The tensors of the state dict in a file, tied ones once, under their first name.

    The state dict may be nested, as in a checkpoint of Lightning or under a key such as ``model_state_dict``.

    Args:
        file: what ``torch.save`` wrote.
        shard: whether it is one of several files of one state dict, which may have no matrix among its tensors.

    Raises:
        ValueError: if the file is corrupt, is of another kind, needs code to be read, or holds no state dict, or
            several.
    """
    unchanged = UnchangedFile(file)
    content = _load(file)
    state = content if shard and _holds_tensors(content) else state_dict_of(content, file)
    tensors: dict[str, Stored] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        refusal = _refusal(name, tensor, file)
        if refusal is None and tensor.numel():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            if place in seen:
                continue  # a tied weight, which stands under its first name
            seen.add(place)
        shape = () if tensor.is_nested else tuple(tensor.shape)
        tensors[name] = Stored(name, shape, tensor.dtype, partial(_read, tensor, unchanged, name), refusal)
    return with_quantized_refused(file, tensors)


def _load(file: Path) -> Any:
    mapped = _can_be_mapped(file)
    try:
        # On the CPU whatever the default device is. Mapped, not loaded: a tensor's bytes are read when it is.
        with torch.device("cpu"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:
        raise
    except RecursionError as error:
        raise ValueError(f"{file} is no checkpoint, or a damaged one (nested too deeply): download it again") from error
    except _DAMAGE as error:
        raise ValueError(_what_went_wrong(file, error)) from error


def _what_went_wrong(file: Path, error: BaseException) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    found = _REFUSED.search(str(error))
    if found:
        return (
            f"{file} holds a {found[1]} beside or among its tensors and cannot be read without running its code. If "
            "you trust where it comes from, allow it with torch.serialization.add_safe_globals, or save its state_dict "
            f'alone: torch.save(torch.load("{file.name}", weights_only=False)["state_dict"], "weights.pt"), or with '
            '.state_dict() in place of ["state_dict"] if it holds a whole module'
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{file} is no checkpoint, a truncated one, or one that cannot be read without running its code: save its "
            "state_dict alone"
        )
    return f"{file} is no checkpoint, or a truncated one ({reason}): download it again"


def _can_be_mapped(file: Path) -> bool:
    """Whether the file is what ``torch.save`` writes since version 1.6, with its tensors as they are in memory.

    Raises:
        ValueError: if it is a TorchScript archive, or unpacks to more than there is memory.
    """
    if not zipfile.is_zipfile(file):
        return False  # an older file, which must be loaded
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
        raise ValueError(f"{file} is no checkpoint, or a truncated one ({error}): download it again") from error
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError(
            f"{file} is a TorchScript archive: load it with torch.jit.load and use KappaProfile.from_model, or save "
            "the state_dict() of what it holds"
        )
    if any(name.rpartition("/")[2] == "archive_format" or name.endswith(".npy") for name in names):
        raise ValueError(
            f"{file} is an exported program or an archive of NumPy: load it with the library that wrote it, and save "
            "its state_dict with torch.save"
        )
    if all(member.compress_type == zipfile.ZIP_STORED for member in members):
        return True
    size, memory = sum(member.file_size for member in members), _physical_memory()
    if size > memory:
        raise ValueError(
            f"{file} is compressed and unpacks to {size} bytes, more than the memory of {memory}: unpack it"
        )
    return False


def _physical_memory() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on this system
        return math.inf


def state_dict_of(content: Any, file: Path) -> dict[str, Any]:
    """The one state dict that a file holds, perhaps among other things.

    Raises:
        ValueError: if it holds none, or several; the message lists their keys.
    """
    if _is_state_dict(content) and not isinstance(content.get("state_dict"), dict):
        return content  # type: ignore[no-any-return]
    found = dict(_nested(content))
    # A Lightning checkpoint's is the module's, whatever its callbacks keep beside it.
    if ("state_dict",) in found:
        return found["state_dict",]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        keys = ", ".join(".".join(map(str, place)) for place in found)
        place = "".join(f"[{key!r}]" for key in next(iter(found)))
        raise ValueError(
            f"{file} holds {len(found)} state_dicts ({keys}): save the one that you mean alone, as in "
            f'torch.save(torch.load("{file.name}", weights_only=True){place}, "weights.pt")'
        )
    raise ValueError(f"{file} holds no state_dict of named tensors with a matrix among them: {_held(content)}")


def _nested(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The state dicts within, each with the keys in a row that lead to it."""
    if not isinstance(content, dict | list | tuple):
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if _is_state_dict(value):
            yield (*place, key), value
        # The tensors of an optimizer are no weights.
        elif isinstance(value, dict) and "param_groups" not in value and len(place) < 2:
            yield from _nested(value, (*place, key))


def _is_state_dict(value: Any) -> bool:
    """Whether it has names, and a tensor that may be a matrix among them."""
    return (
        isinstance(value, dict)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, Tensor) and (tensor.is_nested or tensor.ndim >= 2) for tensor in value.values())
    )


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _held(content: Any) -> str:
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}"
    shown = ", ".join(repr(key) for key in list(content)[:8])
    return f"its keys are {shown}{', …' if len(content) > 8 else ''}" if content else "it is empty"


def _refusal(name: str, tensor: Tensor, file: Path) -> str | None:
    """Why a tensor cannot be read as a matrix, if it cannot."""
    what = f"{name} in {file}"
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"{what} is a {kind} tensor, which has no matrix of its own: save it dense, or exclude it by name"
    if tensor.is_meta:
        return f"{what} was saved on the meta device and has no values: save the model after its weights are loaded"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"{what} is a {type(tensor).__name__}, which cannot be read as it is: save it as a plain tensor"
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() > _LARGEST_EXPANDED and tensor.numel() * tensor.itemsize > stored:
        return f"{what} has shape {tuple(tensor.shape)}, expanded from {stored} stored bytes: exclude it by name"
    return None


def _read(tensor: Tensor, unchanged: UnchangedFile, name: str) -> Tensor:
    # Out of the mapped file, so that whatever becomes of the file, the numbers stay.
    unchanged.require_unchanged()
    try:
        with torch.device("cpu"):
            copy = tensor.detach().clone()
    except (RuntimeError, MemoryError) as error:
        size = tensor.numel() * tensor.itemsize
        raise ValueError(f"{name} in {unchanged.path}, of {size} bytes, does not fit into memory") from error
    unchanged.require_unchanged()
    return copy
