"""What a sensitivity profile was measured with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from kappa_lightning.sensitivity.signal import OPTIMIZERS

METHODS = ("gradient", "path", "trial")
"""Where the figures come from: gradients at the start, the same but for a signal along the first steps of training, or
what the movement of a short training run has changed."""


@dataclass(frozen=True, slots=True)
class SensitivitySettings:
    """How signals and sensitivities were measured.

    Attributes:
        optimizer: what the signal is of: ``"adam"`` or ``"sgd"``.
        method: ``"gradient"``, ``"path"`` or ``"trial"``.
        reference: what the model was asked about, in words.
        batches: of the new task, how many there were.
        rows: of the reference, how many outputs were sampled.
        seed: of everything that was drawn.

    Raises:
        ValueError: if one of them is unknown.
    """

    optimizer: str = "adam"
    method: str = "gradient"
    reference: str = ""
    batches: int = 0
    rows: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for argument, known in (("optimizer", tuple(OPTIMIZERS)), ("method", METHODS)):
            if getattr(self, argument) not in known:
                raise ValueError(
                    f"{argument}={getattr(self, argument)!r} is unknown: use one of {', '.join(map(repr, known))}"
                )

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and strings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> SensitivitySettings:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if an entry is missing, is unknown or has the wrong type.
        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        if not isinstance(entry, dict) or entry.keys() != kinds.keys():
            raise ValueError(f"the settings must have the entries {', '.join(kinds)}: {entry!r}")
        if any(type(entry[name]) is not kind for name, kind in kinds.items()):
            raise ValueError(f"the settings have an entry of the wrong type: {entry!r}")
        return cls(**entry)
