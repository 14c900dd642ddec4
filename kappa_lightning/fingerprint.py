"""A fingerprint of a tensor's content: cheap next to a decomposition, and the same on every device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# 2^64 / golden ratio, odd: consecutive multiples spread evenly over 64 bits (Knuth, TAOCP vol. 3, §6.4).
_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 20


def fingerprint(tensor: Tensor) -> str:
    """64 bits that identify the stored bits, dtype and shape of a tensor.

    The bits, read as 32-bit integers x_i, are summed as Σ x_i·w_i modulo 2^64 with fixed odd weights w_i, chunk after
    chunk. Integer sums do not depend on their order, so every device and thread count gives the same result; an odd
    weight lets no change of a single x_i go unseen. It finds mix-ups, it is no defence against forgery.

    Args:
        tensor: any shape and dtype, on any device.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> import torch
        >>> a = torch.eye(3)
        >>> fingerprint(a) == fingerprint(a.clone()), fingerprint(a) == fingerprint(2 * a)
        (True, False)
    """
    words = _as_words(tensor.detach())
    total = _signed(hash_of_text(f"{tensor.dtype} {tuple(tensor.shape)}"))
    weights = _weights(words.device)
    # The sums stay on the device until all are there: one synchronisation a tensor.
    sums = [torch.sum(chunk.to(torch.int64) * weights[: chunk.numel()]) for chunk in torch.split(words, _CHUNK)]
    for value in torch.stack(sums).tolist():
        total = _signed(total * _GOLDEN + value)
    return f"{total % (1 << 64):016x}"


def hash_of_text(text: str) -> int:
    """64 bits of a text, the same in every process (unlike :func:`hash`)."""
    value = 0
    for byte in text.encode():
        value = ((value ^ byte) * _GOLDEN) % (1 << 64)
    return value


def _as_words(tensor: Tensor) -> Tensor:
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = octets.numel() // 4 * 4
    words = octets[:whole].view(torch.int32)
    return words if whole == octets.numel() else torch.cat([words, octets[whole:].to(torch.int32)])


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    index = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device)
    mixed = index * _signed(_GOLDEN)
    mixed = (mixed ^ (mixed >> 29)) * _signed(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> 32)) | 1


def _signed(value: int) -> int:
    """The two's-complement reading of a value modulo 2^64, which is what an int64 tensor holds."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value
