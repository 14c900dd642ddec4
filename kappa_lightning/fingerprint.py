"""A fingerprint of a tensor's content: cheap next to a decomposition, and the same on every device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

# 2^64 / golden ratio, odd: consecutive multiples spread evenly over 64 bits (Knuth, TAOCP vol. 3, §6.4).
_GOLDEN = 0x9E3779B97F4A7C15
# 256 KiB of 64-bit words, which stay in a CPU's cache from one step of the mixing to the next.
_CHUNK = 1 << 15
_ROWS_ELSEWHERE = 1 << 10


def fingerprint(tensor: Tensor) -> str:
    """64 bits that identify the stored bits, dtype and shape of a tensor.

    The bits are read as 64-bit integers (the last one filled up with zeros); each is mixed with a number w_i of its
    place, and the results are summed modulo 2^64, chunk after chunk. Integer sums do not depend on their order, so
    every device and thread count gives the same result. Different contents agree by chance once in about 2^64; it
    finds mix-ups, it is no defence against forgery.

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
    words, weights = _as_words(tensor.detach()), _weights(tensor.device)
    total = _hash_of_kind(tensor.dtype, tuple(tensor.shape))
    if words.numel() < _CHUNK:
        # Small tensors come by the thousand.
        return _hexadecimal(total * _GOLDEN + int(_mixed_sum(words, weights[: words.numel()])))
    whole = words.numel() // _CHUNK * _CHUNK
    chunks = words[:whole].view(-1, _CHUNK)
    rows = 1 if words.device.type == "cpu" else _ROWS_ELSEWHERE
    # The sums stay on the device until all are there: one synchronization a tensor.
    sums = [_mixed_sum(part, weights) for part in torch.split(chunks, rows)]
    rest = words[whole:]
    sums.append(_mixed_sum(rest.unsqueeze(0), weights[: rest.numel()]))
    for value in torch.cat(sums).tolist():
        total = _signed(total * _GOLDEN + value)
    return _hexadecimal(total)


def fingerprint_of_sources(tensors: Iterable[Tensor]) -> str:
    """64 bits that identify what a tensor is computed from, in whatever order; never those of a single tensor.

    Example:
        >>> import torch
        >>> a, b = torch.eye(3), torch.ones(3)
        >>> fingerprint_of_sources([a, b]) == fingerprint_of_sources([b, a])
        True
        >>> fingerprint_of_sources([a]) == fingerprint(a)
        False
    """
    return _hexadecimal(hash_of_text(f"computed from {' '.join(sorted(map(fingerprint, tensors)))}"))


def hash_of_text(text: str) -> int:
    """64 bits of a text, the same in every process (unlike :func:`hash`)."""
    value = 0
    for byte in text.encode():
        value = ((value ^ byte) * _GOLDEN) % (1 << 64)
    return value


@lru_cache(maxsize=1024)
def _hash_of_kind(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return _signed(hash_of_text(f"{dtype} {shape}"))


def _hexadecimal(value: int) -> str:
    return f"{value % (1 << 64):016x}"


def _mixed_sum(words: Tensor, weights: Tensor) -> Tensor:
    mixed = (words ^ weights) * _signed(_GOLDEN)
    # A product carries low bits upwards only; without this, flips of a sign bit would look alike everywhere.
    mixed ^= mixed >> 32
    mixed *= weights
    return mixed.sum(-1)


def _as_words(tensor: Tensor) -> Tensor:
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    if octets.numel() % 8:
        octets = torch.cat([octets, octets.new_zeros(-octets.numel() % 8)])
    if octets.storage_offset() % 8:
        octets = octets.clone()
    return octets.view(torch.int64)


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
