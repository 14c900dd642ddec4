"""Weights that are stored quantized: bitsandbytes in 4 and 8 bits, torchao, and PyTorch's own."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn


def is_quantized(parameter: Tensor) -> bool:
    """Whether a weight's stored numbers are not the ones it stands for."""
    return (
        not (parameter.is_floating_point() or parameter.is_complex())
        or parameter.is_quantized
        or _kind(parameter) in ("Params4bit", "Int8Params")
        or _is_torchao(parameter)
    )


def logical_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape that a weight stands for; bitsandbytes packs two 4-bit numbers into a byte."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def dequantize(name: str, parameter: Tensor, layer: nn.Module) -> Tensor:
    """The numbers that a quantized weight stands for, in a tensor of its own.

    Raises:
        ImportError: if the library that quantized it is not installed.
        TypeError: if it is of no known kind.
    """
    kind = _kind(parameter)
    with torch.no_grad():
        if kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
            functional = _bitsandbytes(name).functional
            return functional.dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[no-any-return, attr-defined]
        if kind == "Int8Params" and parameter.dtype == torch.int8:
            # The layer takes the scales over at its first forward pass.
            state = getattr(layer, "state", None)
            scales = getattr(parameter, "SCB", None)
            scales = getattr(state, "SCB", None) if scales is None else scales
            if scales is not None:
                return _bitsandbytes(name).functional.int8_vectorwise_dequant(parameter.data, scales)  # type: ignore[no-any-return]
        if parameter.is_floating_point() and kind in ("Params4bit", "Int8Params"):
            return parameter.detach()  # quantized only when it is moved to a device
        if parameter.is_quantized or _is_torchao(parameter):
            return parameter.detach().dequantize()
    if type(layer).__name__.startswith("Mxfp4"):
        raise TypeError(
            f"{name} is stored in MXFP4 ({parameter.dtype}, shape {tuple(parameter.shape)}), in which nothing can be "
            "trained: load the model with quantization_config=Mxfp4Config(dequantize=True), or scan its checkpoint, "
            "which is read dequantized"
        )
    raise TypeError(
        f"{name} is stored as {parameter.dtype} ({kind}, shape {tuple(parameter.shape)}), a quantized weight that "
        "cannot be read: exclude it by name, or load the model unquantized"
    )


def _kind(parameter: Tensor) -> str:
    return type(parameter).__name__


def _is_torchao(parameter: Tensor) -> bool:
    return type(parameter.data).__module__.startswith("torchao")


def _bitsandbytes(name: str) -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f"{name} was quantized with bitsandbytes: pip install bitsandbytes to read it") from error
    return bitsandbytes  # type: ignore[no-any-return]
