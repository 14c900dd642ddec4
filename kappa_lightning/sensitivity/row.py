"""One row of a sensitivity profile."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from kappa_lightning.profile.file import decode


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """One tensor: what moving it does for the new task, and to the pretrained model.

    Attributes:
        name: the parameter's name; of a part of one, with its label in brackets.
        shape: its shape.
        signal: b, how much moving it lowers the new task's loss: Σ|ḡ_i| under Adam, in units of the loss per unit of
            weight, Σḡ_i² under gradient descent.
        sensitivity: c, how much moving it changes what the pretrained model says: ΣF_ii, in nats a row of the output
            (a token, a sample) per squared unit of weight.
        num_parameters: n, the number of entries that train with it.
        dtype: the stored precision, such as ``"float32"``.
        fingerprint: identifies the stored content; empty if none was taken.
    """

    name: str
    shape: tuple[int, ...]
    signal: float
    sensitivity: float
    num_parameters: int
    dtype: str = "float32"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for figure, value in (("signal", self.signal), ("sensitivity", self.sensitivity)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{self.name} has the {figure} {value}: it must be finite and at least 0")
        if self.num_parameters < 1:
            raise ValueError(f"{self.name} has {self.num_parameters} parameters: give at least 1")

    def to_dict(self) -> dict[str, Any]:
        """The row as plain numbers, strings and lists."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, entry: Any) -> SensitivityRow:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if an entry is missing, is unknown or has the wrong type.
        """
        if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"a row must have the entries {', '.join(field.name for field in fields(cls))}: {entry!r}")
        shape, count = entry["shape"], entry["num_parameters"]
        figures = [decode(entry[name]) for name in ("signal", "sensitivity")]
        valid = (
            all(isinstance(entry[name], str) for name in ("name", "dtype", "fingerprint"))
            and isinstance(shape, list | tuple)
            and all(isinstance(size, int) for size in (*shape, count))
            and all(isinstance(value, int | float) and not isinstance(value, bool) for value in figures)
        )
        if not valid:
            raise ValueError(f"a row has an entry of the wrong type: {entry!r}")
        return cls(**{**entry, "shape": tuple(shape)})
