"""What a script, a YAML file or an array hands over, as the plain Python values that a checkpoint can hold."""

from __future__ import annotations

import inspect
import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn


def as_number(value: Any, argument: str) -> int | float:
    """An int for what is integral by its type, a float for any other real number; NumPy's are numbers, bools are not.

    Raises:
        TypeError: if it is no number; the message names the argument.

    Example:
        >>> import numpy as np
        >>> as_number(np.float64(0.5), "top_p"), as_number(np.int64(3), "num_tensors")
        (0.5, 3)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}={value!r} is not a number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def as_int(value: Any, argument: str) -> int:
    """An int from whatever is integral by its type.

    Raises:
        TypeError: if it is not; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument}={value!r} is not an int")
    return operator.index(value)


def as_count(value: Any, argument: str) -> int:
    """An int of at least 1 from whatever is integral by its type.

    Raises:
        ValueError: if it is another number or none; the message names the argument.

    Example:
        >>> import numpy as np
        >>> as_count(np.int64(3), "every_n_epochs")
        3
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{argument}={value!r} must be an int of at least 1")
    return operator.index(value)


def as_bool(value: Any, argument: str) -> bool:
    """A bool from one of Python's or NumPy's.

    Raises:
        TypeError: if it is none, such as the string ``"False"``, which would count as true.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{argument}={value!r} is a {type(value).__name__}: give True or False")
    return bool(value)


def as_globs(patterns: Any, argument: str) -> tuple[str, ...]:
    """A tuple of globs from any sequence of strings, such as a list, a tuple or OmegaConf's ``ListConfig``.

    Raises:
        TypeError: if it is one string, whose letters would each count as a pattern, or holds something else.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{argument}={patterns!r} is one string: give a list of globs, such as [{str(patterns)!r}]")
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping):
        raise TypeError(f"{argument}={patterns!r} is a {type(patterns).__name__}: give a list of globs")
    globs = tuple(patterns)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument} holds {glob!r}, a {type(glob).__name__}: give a list of globs")
    return tuple(str(glob) for glob in globs)


def as_names(names: Any, argument: str) -> list[str]:
    """A list of names from any iterable of strings.

    Raises:
        TypeError: if it is one string, whose letters would each count as a name, or no iterable.

    Example:
        >>> as_names("fc.weight", "names")
        Traceback (most recent call last):
        ...
        TypeError: names='fc.weight' is one string: give a list of names, such as ['fc.weight']
    """
    if isinstance(names, str):
        raise TypeError(f"{argument}={names!r} is one string: give a list of names, such as [{str(names)!r}]")
    if not isinstance(names, Iterable):
        raise TypeError(f"{argument}={names!r} is a {type(names).__name__}: give a list of names")
    return list(names)


def as_module(module: Any, argument: str) -> nn.Module:
    """A module, unchanged.

    Raises:
        TypeError: if it is none, such as the path of one.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}={module!r} is a {type(module).__name__}: give the model itself, a torch.nn.Module")
    return module


def as_path(path: Any, argument: str, instead: str) -> Path:
    """A path from a string or a path.

    Args:
        path: what was given.
        argument: its name.
        instead: what may be given, in the words of an error.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} is a {type(path).__name__}: give {instead}")
    return Path(path)


def describe(instance: object, arguments: Mapping[str, Any]) -> str:
    """The call that makes an object, with the arguments that differ from their defaults.

    Example:
        >>> class Callback:
        ...     def __init__(self, every=1, names=("*",), top_p=None):
        ...         pass
        >>> describe(Callback(), {"every": 2, "names": ["*"], "top_p": None})
        'Callback(every=2)'
    """
    parameters = inspect.signature(type(instance).__init__).parameters

    def is_default(name: str, value: Any) -> bool:
        default = parameters[name].default
        return bool((tuple(value) if isinstance(value, list) else value) == default)

    shown = (
        f"{name}={arguments[name]!r}"
        for name in parameters
        if name in arguments and not is_default(name, arguments[name])
    )
    return f"{type(instance).__name__}({', '.join(shown)})"
