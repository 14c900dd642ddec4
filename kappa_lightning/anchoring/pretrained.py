"""What trains, as it was before training: copies in memory or in a file, and passes of the model with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from kappa_lightning.files import replacing
from kappa_lightning.parts import store_parts
from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.quantized import is_quantized
from kappa_lightning.weights.sharded import is_sharded, place_of, reshard, whole

Result = TypeVar("Result")


class PretrainedState:
    """Copies of a module's trainable parameters, and of the statistics of its normalization layers.

    Of a sharded parameter each process keeps its own part. A tied parameter is kept once.

    Args:
        device: where the copies lie; ``None`` is where each parameter is.
        file: a ``.safetensors`` file to keep them in instead; of several processes each needs its own.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> state = PretrainedState()
        >>> state.add(layer)
        ['weight']
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(1)
        >>> (layer.weight - state["weight"]).item()
        1.0
    """

    def __init__(self, device: torch.device | str | None = None, file: str | os.PathLike[str] | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self.file = None if file is None else Path(file)
        self._kept: dict[str, Tensor] = {}
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        """The copy of that name: a plain tensor, of a sharded parameter this process' part.

        Raises:
            KeyError: if there is none.
        """
        if name not in self._names:
            raise KeyError(f"no copy of {name} was made before it trained")
        if self.file is None:
            return self._kept[name]
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(name)  # type: ignore[no-any-return]

    @property
    def num_bytes(self) -> int:
        """What the copies take in this process, or in its file."""
        return sum(self._names.values())

    def add(self, module: nn.Module) -> list[str]:
        """Copy every tensor that trains and has no copy yet, which must not have trained until now.

        Returns:
            The names that are new.

        Raises:
            TypeError: if a parameter that trains is quantized.
            ValueError: if it has no values yet.
        """
        found = {name: tensor for name, tensor in tracked(module).items() if name not in self._names}
        copies = {name: self._copy(local(tensor)) for name, tensor in found.items()}
        if copies:
            self._keep(copies)
        return list(copies)

    def move_to(self, device: torch.device | str | None, module: nn.Module) -> None:
        """Keep the copies elsewhere; those in a file stay there.

        Args:
            device: where; ``None`` is beside the parameters.
            module: has the parameters.
        """
        self.device = None if device is None else torch.device(device)
        if self.file is None:
            tensors = tracked(module, every=True)
            self._kept = {
                name: copy.to(local(tensors[name]).device if self.device is None else self.device)
                for name, copy in self._kept.items()
            }

    def to_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The copies on the CPU, sharded ones whole, which all their processes must ask for together."""
        tensors = tracked(module, every=True)
        return {name: _gathered(self[name], tensors[name]) for name in self._names}

    def load(self, module: nn.Module, copies: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`to_dict` returned, on however many processes.

        Raises:
            ValueError: if a copy is of no tensor of this module, or of one of another shape.
        """
        tensors = tracked(module, every=True)
        parts = {}
        for name, copy in copies.items():
            here = tensors.get(name)
            if here is None or tuple(here.shape) != tuple(copy.shape):
                found = "it is not in this module" if here is None else f"it is {tuple(here.shape)} here"
                raise ValueError(f"the pretrained {name} has shape {tuple(copy.shape)}, and {found}: another model's")
            # Placed as add would have, so that a resumed run computes where the first one did.
            part = _part_of(copy, here).to(local(here).device)
            parts[name] = self._copy(part)
        self._kept, self._names = {}, {}
        self._keep(parts)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], module: nn.Module) -> PretrainedState:
        """The state that an earlier run of this module kept in a file.

        Raises:
            ValueError: if the file is damaged, or holds a tensor that this module has not or in another shape.
        """
        from safetensors import SafetensorError, safe_open

        state, tensors = cls(file=file), tracked(module, every=True)
        try:
            with safe_open(file, framework="pt") as kept:
                for name in kept.keys():  # noqa: SIM118
                    copy = kept.get_slice(name)
                    here = None if name not in tensors else tuple(local(tensors[name]).shape)
                    if here != tuple(copy.get_shape()):
                        found = "it is not in this module" if here is None else f"it is {here} here"
                        raise ValueError(
                            f"{file} has the pretrained {name} of shape {tuple(copy.get_shape())}, and {found}: it is "
                            "another model's, or another number of processes wrote it"
                        )
                    tensor = kept.get_tensor(name)
                    state._names[name] = tensor.numel() * tensor.element_size()
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt or truncated ({error})") from error
        return state

    def _copy(self, tensor: Tensor) -> Tensor:
        place = torch.device("cpu") if self.file is not None else self.device or tensor.device
        return tensor.detach().to(place, copy=True).contiguous()

    def _keep(self, copies: dict[str, Tensor]) -> None:
        if self.file is None:
            self._kept.update(copies)
        else:
            from safetensors.torch import save_file

            everything = {name: self[name] for name in self._names} | copies
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as temporary:
                save_file(everything, temporary)
        self._names |= {name: copy.numel() * copy.element_size() for name, copy in copies.items()}


def tracked(module: nn.Module, *, every: bool = False) -> dict[str, Tensor]:
    """What training changes: parameters that require a gradient and running statistics, by plain names.

    Args:
        module: any module.
        every: whether to count frozen parameters as well.

    Raises:
        TypeError: if a parameter that trains is quantized.
        ValueError: if it has no values yet.
    """
    found: dict[str, Tensor] = {}
    for stored_name, parameter in module.named_parameters():
        name = plain_name(stored_name)
        if not (parameter.requires_grad or every):
            continue
        if parameter.requires_grad and (isinstance(parameter, UninitializedParameter) or parameter.is_meta):
            raise ValueError(f"{name} has no values yet: load or initialize it before training starts")
        if parameter.requires_grad and is_quantized(parameter):
            raise TypeError(
                f"{name} trains and is stored as {parameter.dtype}, quantized, so it has no way back to where it was: "
                "freeze it and train an adapter"
            )
        found[name] = parameter
    for prefix, layer in module.named_modules():
        if isinstance(layer, _NormBase):
            for attribute in ("running_mean", "running_var"):
                statistics = getattr(layer, attribute)
                if isinstance(statistics, Tensor):
                    found[plain_name(f"{prefix}.{attribute}" if prefix else attribute)] = statistics
    return found


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor.data
    return part


def call_pretrained(
    module: nn.Module, state: PretrainedState, function: Callable[..., Result], *arguments: Any
) -> Result:
    """``function(module, *arguments)`` on the module as it was, which afterwards is as it is now.

    Plain tensors are swapped by :func:`torch.func.functional_call`, without a copy if the state lies on their device;
    sharded ones, and parts of a parameter that train alone, are exchanged in place, which takes a copy of what trains
    while the function runs.

    Args:
        module: from which ``state`` was taken.
        state: what trains, as it was.
        function: runs without gradients.
        arguments: further ones of the function.
    """
    # What an earlier pass has gathered hides the shards, and would be used again instead of them.
    reshard(module)
    tensors = tracked(module, every=True)
    with torch.no_grad():
        in_place = {name: tensors[name] for name in state if is_sharded(tensors[name]) or name.endswith("]")}
        with exchanged(in_place, state, then=lambda: store_parts(module)):
            stored = {plain_name(name): name for name, _ in module.named_parameters()}
            stored |= {plain_name(name): name for name, _ in module.named_buffers()}
            swapped = {
                f"module.{stored[name]}": state[name].to(tensors[name].device) for name in state if name not in in_place
            }
            try:
                return torch.func.functional_call(_Call(module), swapped, (function, *arguments))  # type: ignore[no-any-return]
            finally:
                reshard(module)


@contextmanager
def exchanged(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor] | PretrainedState,
    then: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Give tensors other values in place, and their own back afterwards, to the last bit; after both, call ``then``."""
    own = {name: local(tensor).clone() for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            local(tensor).copy_(values[name])
        then()
        yield
    finally:
        for name, value in own.items():
            local(tensors[name]).copy_(value)
    # Not after an error: another process may not have met it, and would not take part in what is done together.
    then()


class _Call(nn.Module):
    """Calls a function on a module from inside a forward, as functional_call wants it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.module, *arguments)


def _gathered(part: Tensor, tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return part.cpu()
    from torch.distributed.tensor import DTensor

    like = local(tensor)
    shards = DTensor.from_local(
        part.to(like.device), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return whole(shards).cpu()


def _part_of(whole_copy: Tensor, tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return whole_copy
    offsets, sizes = place_of(tensor)
    return whole_copy[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
