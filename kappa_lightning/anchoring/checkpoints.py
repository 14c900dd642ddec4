"""The way back between two checkpoints, tensor by tensor from disk."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.anchoring.path import Along, Factors, between, groups_of, walked
from kappa_lightning.anchoring.safetensors_stream import write_safetensors
from kappa_lightning.anchoring.spectral_filter import FilteredUpdate
from kappa_lightning.files import replacing
from kappa_lightning.weights.checkpoint.files import find_source, read_files
from kappa_lightning.weights.checkpoint.pickle_file import state_dict_of
from kappa_lightning.weights.checkpoint.stored import Stored
from kappa_lightning.weights.weight import is_matrix_shape, view_of

_LORA = re.compile(r"\blora_(?:embedding_)?([AB])\b")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".index.json")


class CheckpointWalk:
    """Points between a pretrained and a trained checkpoint; at most two tensors are in memory at a time.

    The names may differ by a prefix, as those of a LightningModule that holds the base as ``self.model`` do. A tensor
    that only the trained checkpoint has stays as it is there, such as a new head. Of a LoRA adapter, which the
    base does not have, B is scaled: it began at zero.

    Args:
        base: the pretrained checkpoint, of any kind that :class:`~kappa_lightning.KappaProfile` reads.
        trained: the trained one.
        along: see :class:`~kappa_lightning.anchoring.path.WalkPath`.
        depth_groups: the number of stretches of layers.
        exclude: globs of what stays as trained at every point, such as a head that was trained anew, which may have
            another shape than in the base.

    Attributes:
        groups: the names of the factors.
        changed: how many tensors are in both and may differ.

    Raises:
        FileNotFoundError: if a checkpoint is not there.
        ValueError: if a tensor has another shape in the two, is quantized, or is missing in the trained checkpoint, or
            ``exclude`` matches none or all of the trained checkpoint's names.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        trained: str | os.PathLike[str],
        along: Along = "all",
        *,
        depth_groups: int = 3,
        exclude: Sequence[str] = (),
    ) -> None:
        self.source = find_source(trained)
        self._along = along
        self._trained = read_files(self.source)
        start = _by_trained_names(read_files(find_source(base)), self._trained)
        moves = set(walked(self._trained, exclude))
        self._start = {name: tensor for name, tensor in start.items() if name in moves}
        adapters = [name for name in self._trained if name in moves and name not in start and _LORA.search(name)]
        missing = [name for name in start if name not in self._trained]
        if missing and not adapters:
            raise ValueError(
                f"{trained} lacks {missing[0]}, which {base} has: they are not of one model, or name its tensors in "
                f"ways that differ by more than a prefix, such as {next(iter(self._trained))}"
            )
        if not self._start and not adapters:
            raise ValueError(f"{base} and {trained} have no tensor in common, such as {next(iter(self._trained))}")
        for name, tensor in self._start.items():
            other = self._trained[name]
            for each in (tensor, other):
                if each.refusal is not None:
                    raise ValueError(each.refusal)
            if tensor.shape != other.shape:
                raise ValueError(f"{name} is {tensor.shape} in {base} and {other.shape} in {trained}: another model's")
        if along == "singular_values" and adapters:
            raise ValueError(f'{adapters[0]} is an adapter\'s, which along="singular_values" does not reach: use "all"')
        moving = [name for name, tensor in self._start.items() if tensor.has_values]
        # A of an adapter stays as trained.
        moving += [name for name in adapters if "B" in _LORA.findall(name)]
        self._group_of = groups_of(moving, along, depth_groups)
        self.groups = tuple(dict.fromkeys(self._group_of.values()))
        self.changed = len(moving)

    def tensors(self, factors: Factors | float) -> Iterator[tuple[str, Tensor]]:
        """Every tensor at a point, on the CPU, by the name that it has in the trained checkpoint."""
        for name in self._trained:
            yield name, self.tensor(name, factors)

    def tensor(self, name: str, factors: Factors | float) -> Tensor:
        """One tensor at a point; both ends are exact."""
        trained = self._trained[name].read()
        group = self._group_of.get(name)
        factor = 1.0 if group is None else factors[group] if isinstance(factors, Mapping) else factors
        if factor == 1:
            return trained
        if name not in self._start:
            is_b = "B" in _LORA.findall(name)
            return (trained.to(_wide(trained)) * factor).to(trained.dtype) if is_b else trained
        start = self._start[name].read()
        if factor == 0:
            return start.to(trained.dtype)
        wide = torch.promote_types(_wide(start), _wide(trained))
        before, after = start.to(wide), trained.to(wide)
        if self._along == "singular_values" and is_matrix_shape(name, tuple(trained.shape)):
            update = FilteredUpdate(after - before, view_of(tuple(trained.shape)), torch.device("cpu"))
            return (before + update.at(factor)).to(trained.dtype)
        return between(before, after, factor).to(trained.dtype)

    def load_into(self, module: nn.Module, factors: Factors | float) -> None:
        """Put a module's weights at a point, and what stays as trained, such as a new head, to what it is there.

        Raises:
            ValueError: if the module has no tensor of a name that moves.
        """
        own = dict(module.state_dict(keep_vars=True))
        with torch.no_grad():
            for name, stored in self._trained.items():
                target = own.get(name)
                if target is None and name in self._group_of:
                    held = f"{next(iter(own))}, …" if own else "no tensors"
                    raise ValueError(
                        f"the model has no {name}, which {self.source} holds: make it with the names of the "
                        f"checkpoint; it has {held}"
                    )
                if target is not None and (name in self._group_of or stored.refusal is None):
                    target.copy_(self.tensor(name, factors))

    def save(self, factors: Factors | float, out: str | os.PathLike[str]) -> Path:
        """Write a point as a checkpoint of the trained one's kind.

        A folder becomes a folder with one ``.safetensors`` file and whatever lay beside the weights; a ``.ckpt`` keeps
        all else that it holds.

        Returns:
            The file with the weights.

        Raises:
            FileNotFoundError, ValueError: see :meth:`require_target`.
        """
        target = Path(out)
        self.require_target(target)
        if self.source.is_dir():
            return self._save_folder(factors, target)
        if target.suffix == ".safetensors":
            write_safetensors(target, self._described(), self.tensors(factors))
            return target
        self._save_pickle(factors, target)
        return target

    def require_target(self, out: str | os.PathLike[str]) -> None:
        """Find out before the work that a point could not be written there.

        Raises:
            FileNotFoundError: if its folder is not there.
            ValueError: if it is there already, or its ending is of another kind than the trained checkpoint's.
        """
        target = Path(out)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target}: there is no folder {target.parent}")
        if self.source.is_dir():
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise ValueError(f"{target} is there already: name a new folder, or an empty one")
            return
        if target.exists():
            raise ValueError(f"{target} is there already: name a new file")
        if self.source.suffix == ".safetensors" != target.suffix:
            raise ValueError(f"{target} must end in .safetensors, as {self.source} does")

    def _described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found = {}
        for name, tensor in self._trained.items():
            if tensor.refusal is not None or tensor.dtype is None:
                raise ValueError(tensor.refusal or f"{name} is stored in a precision that PyTorch does not have")
            found[name] = (tensor.shape, tensor.dtype)
        return found

    def _save_folder(self, factors: Factors | float, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        is_adapter = (self.source / "adapter_config.json").is_file()
        weights = folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors")
        # PEFT stores an adapter without its name.
        names = {name: re.sub(r"\.default(?=\.weight$|$)", "", name) if is_adapter else name for name in self._trained}
        described = {names[name]: kind for name, kind in self._described().items()}
        write_safetensors(weights, described, ((names[name], tensor) for name, tensor in self.tensors(factors)))
        for file in sorted(self.source.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copy2(file, folder / file.name)
        return weights

    def _save_pickle(self, factors: Factors | float, target: Path) -> None:
        content: Any = torch.load(self.source, map_location="cpu", weights_only=True, mmap=True)
        state = state_dict_of(content, self.source)
        # In a file beside the target, so that the memory holds no second checkpoint.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            moved: dict[tuple[Any, Any], Tensor] = {}
            for number, (name, old) in enumerate(state.items()):
                if not isinstance(old, Tensor):
                    continue
                place = (old.untyped_storage().data_ptr(), old.storage_offset())
                if name in self._trained and old.numel():
                    value = self.tensor(name, factors)
                    file = str(Path(folder, str(number)))
                    held = torch.from_file(file, shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
                    moved[place] = held.copy_(value)
                # A tied weight stands under its first name.
                state[name] = moved.get(place, old)
            with replacing(target) as temporary:
                torch.save(content, temporary)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _by_trained_names(start: Mapping[str, Stored], trained: Mapping[str, Stored]) -> dict[str, Stored]:
    """The pretrained tensors by the trained one's names, where one of the two has a prefix before all it shares."""
    if not start or not trained or any(name in trained for name in start):
        return dict(start)
    first = next(iter(start))
    for name in trained:
        prefix = name.removesuffix(f".{first}")
        if prefix != name and all(f"{prefix}.{each}" in trained for each in start):
            return {f"{prefix}.{each}": tensor for each, tensor in start.items()}
    parts = first.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if first.removeprefix(prefix) in trained and all(name.startswith(prefix) for name in start):
            return {name.removeprefix(prefix): tensor for name, tensor in start.items()}
    return dict(start)
