"""Plain data in and out of files that hold no infinite numbers, no tuples and no missing values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NAMES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encoded(value: Any) -> Any:
    """Plain data with every number that is not finite as a string, and what is no plain value as its text.

    Example:
        >>> encoded({"a": (1.0, float("inf"))})
        {'a': [1.0, 'inf']}
    """
    if isinstance(value, Mapping):
        return {str(key): encoded(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [encoded(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) else repr(value)


def decoded(value: Any) -> Any:
    """The inverse of :func:`encoded`, but for tuples and texts of other things."""
    if isinstance(value, dict):
        return {key: decoded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [decoded(entry) for entry in value]
    return _NAMES.get(value, value) if isinstance(value, str) else value
