"""One row of a profile: a tensor's spectrum as plain numbers, and what it was computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from kappa_lightning.profile.file import decode
from kappa_lightning.profile.settings import EXPERTS

_PER_MATRIX = ("kappas", "sigma_maxs", "log_volumes", "frobenius_norms")
_NUMBERS = ("kappa", "sigma_max", "sigma_min", "log_volume", "frobenius_norm", "rtol")


@dataclass(frozen=True, slots=True)
class MatrixSpectrum:
    """One matrix of a row, its fields those of a :class:`~kappa_lightning.Spectrum`; ``shape`` is (rows, cols)."""

    shape: tuple[int, int]
    kappa: float
    sigma_max: float
    log_volume: float
    frobenius_norm: float


@dataclass(frozen=True, slots=True)
class KappaRow:
    """One tensor of a profile: a :class:`~kappa_lightning.Spectrum` as plain numbers, and where it came from.

    Of a stack of matrices, such as fused experts, ``sigma_max``, ``sigma_min``, ``log_volume`` and
    ``frobenius_norm`` are those of the block-diagonal matrix of all of them.

    Attributes:
        name: the parameter's name.
        shape: the parameter's shape; of a quantized one, the shape that it stands for.
        kappa: condition number; of a stack, combined over its matrices, by default their mean as in PEFT.
        sigma_max: largest singular value, in the unit of the weights.
        sigma_min: smallest of the min(rows, cols) singular values.
        log_volume: Σ ln σ_i, in nats.
        frobenius_norm: root of the sum of squares.
        rtol: the relative error of ``kappa`` that is guaranteed.
        kappas: of a stack, the κ of each matrix; otherwise ``None``.
        sigma_maxs: of a stack, the σ_max of each matrix; otherwise ``None``.
        log_volumes: of a stack, the log-volume of each matrix; otherwise ``None``.
        frobenius_norms: of a stack, the norm of each matrix; otherwise ``None``.
        matrix_shape: (rows, cols) of each matrix; a Conv kernel's is (out, in·kh·kw).
        experts: how the figures of a stack's matrices combine, a key of
            :data:`~kappa_lightning.profile.settings.EXPERTS`.
        dtype: the stored precision, such as ``"float32"``.
        fingerprint: identifies the stored content.
    """

    name: str
    shape: tuple[int, ...]
    kappa: float
    sigma_max: float
    sigma_min: float
    log_volume: float
    frobenius_norm: float
    rtol: float
    kappas: tuple[float, ...] | None
    sigma_maxs: tuple[float, ...] | None
    log_volumes: tuple[float, ...] | None
    frobenius_norms: tuple[float, ...] | None
    matrix_shape: tuple[int, int]
    experts: str
    dtype: str
    fingerprint: str

    @property
    def num_parameters(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> tuple[MatrixSpectrum, ...]:
        """The tensor's one matrix, or all of a stack."""
        figures = [getattr(self, name) for name in _PER_MATRIX]
        if self.kappas is None:
            figures = [(self.kappa,), (self.sigma_max,), (self.log_volume,), (self.frobenius_norm,)]
        return tuple(MatrixSpectrum(self.matrix_shape, *each) for each in zip(*figures, strict=True))

    def combine(self, values: Iterable[float]) -> float:
        """One figure from one for each matrix, as ``experts`` says."""
        return float(EXPERTS[self.experts](list(values)))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain numbers, strings and tuples."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> KappaRow:
        """The inverse of :meth:`to_dict`, lists being taken for tuples.

        Raises:
            ValueError: if an entry is missing, is unknown or has the wrong type.
        """
        if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"a row must have the entries {', '.join(field.name for field in fields(cls))}: {entry!r}")
        entry = {**entry, **{key: decode(entry[key]) for key in _NUMBERS}}
        for key in _PER_MATRIX:
            if entry[key] is not None:
                entry[key] = tuple(decode(number) for number in _tuple(entry[key]))
        row = cls(**{**entry, **{key: _tuple(entry[key]) for key in ("shape", "matrix_shape")}})
        texts = (row.name, row.dtype, row.fingerprint, row.experts)
        stacks = [getattr(row, key) for key in _PER_MATRIX]
        numbers = [getattr(row, key) for key in _NUMBERS] + [number for stack in stacks for number in stack or ()]
        valid = (
            all(isinstance(text, str) for text in texts)
            and all(_is_number(number) for number in numbers)
            and len({None if stack is None else len(stack) for stack in stacks}) == 1
            and len(row.matrix_shape) == 2
            and all(isinstance(size, int) for size in (*row.shape, *row.matrix_shape))
            and row.experts in EXPERTS
        )
        if not valid:
            raise ValueError(f"a row has an entry of the wrong type: {entry!r}")
        return row


def _tuple(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"a row has {values!r} where a list belongs")
    return tuple(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
