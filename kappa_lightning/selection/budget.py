"""How much may train: one of four limits."""

from __future__ import annotations

from dataclasses import dataclass

from kappa_lightning.arguments import as_number

DEFAULT_TOP_P = 0.2
"""The budget where none is given: the fifth of the tensors with the lowest scores."""


@dataclass(frozen=True)
class Budget:
    """How much may train: exactly one of four limits, stored as a plain number.

    Attributes:
        top_p: a share of the tensors, in (0, 1]; at least one tensor.
        num_tensors: a number of tensors.
        max_kappa: every tensor whose κ is at most this.
        max_params: a number of parameters if an int, a share of the candidates' parameters in (0, 1] if a float; the
            first ones of the ranking train until the next does not fit (one that is larger than the whole budget is
            passed over). A whole float above 1 is a number, too: from Python 3.12 on LightningCLI may read the 1000 of
            a YAML file as 1000.0, whatever the order of a union's types.

    Raises:
        TypeError: if a limit has the wrong type.
        ValueError: if none or several are given, or if the limit can select nothing.

    Example:
        >>> Budget(top_p=0.0)
        Traceback (most recent call last):
        ...
        ValueError: top_p=0.0 is a budget of nothing: give a share of the tensors in (0, 1]
    """

    top_p: float | None = None
    num_tensors: int | None = None
    max_kappa: float | None = None
    max_params: int | float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            found = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise ValueError(f"give exactly one budget of top_p, num_tensors, max_kappa and max_params; got {found}")
        ((name, value),) = given.items()
        value = as_number(value, name)
        if name == "max_params" and isinstance(value, float) and value > 1 and value.is_integer():
            value = int(value)
        object.__setattr__(self, name, value)
        if name == "num_tensors" and not isinstance(value, int):
            raise TypeError(f"num_tensors={value!r} must be an int; for a share of the tensors use top_p")
        is_share = name == "top_p" or (name == "max_params" and isinstance(value, float))
        if is_share and not 0 < value <= 1:
            what = "tensors" if name == "top_p" else "parameters"
            problem = "is a budget of nothing" if value == 0 else "is not a share"
            count = "" if name == "top_p" else ", or an int for their number"
            raise ValueError(f"{name}={value!r} {problem}: give a share of the {what} in (0, 1]{count}")
        if not is_share and name != "max_kappa" and value < 1:
            raise ValueError(f"{name}={value!r} is a budget of nothing: give at least 1")
        if name == "max_kappa" and not value >= 1:
            raise ValueError(f"max_kappa={value!r} is a budget of nothing: no matrix has a condition number below 1")

    def __str__(self) -> str:
        return next(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
