"""One row of a profile: a tensor's spectrum as plain numbers, and what it was computed from."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from kappa_lightning.profile.file import decode
from kappa_lightning.profile.settings import EXPERTS

_PER_MATRIX = ("kappas", "sigma_maxs", "log_volumes", "frobenius_norms")
_FINGERPRINT = re.compile("[0-9a-f]{16}")
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
        layout: how the tensor was read: a ``"matrix"``, a ``"stack"`` of them, a ``"convolution"`` or a ``"transposed
            convolution of 1 group(s)"``; empty in files that do not say.
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
    layout: str = ""

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
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, entry: Any) -> KappaRow:
        """The inverse of :meth:`to_dict`, lists being taken for tuples.

        Raises:
            ValueError: if an entry is missing, is unknown, has the wrong type, or cannot be: sizes or figures that
                contradict each other, a κ below 1.
        """
        if isinstance(entry, dict) and "layout" not in entry:  # as version 0.1.0 writes it
            is_matrix = entry.get("shape") == entry.get("matrix_shape")
            entry = {**entry, "layout": "matrix" if is_matrix else "stack" if entry.get("kappas") is not None else ""}
        if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(cls)}:
            wanted = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"a row must have the entries {wanted}: {reprlib.repr(entry)}")
        texts = ("name", "experts", "dtype", "fingerprint", "layout")
        values: dict[str, Any] = {key: _text(key, entry[key]) for key in texts}
        values |= {key: _number(key, entry[key]) for key in _NUMBERS}
        values |= {key: _sizes(key, entry[key]) for key in ("shape", "matrix_shape")}
        for key in _PER_MATRIX:
            numbers = entry[key]
            values[key] = None if numbers is None else tuple(_number(key, number) for number in _list(key, numbers))
        row = cls(**values)
        row._require_sense()
        return row

    def _require_sense(self) -> None:
        """Raise a ValueError if the entries, each of which has its type, cannot be those of any tensor."""
        stacks = [getattr(self, key) for key in _PER_MATRIX]
        count = len(stacks[0]) if stacks[0] is not None else 1
        rows, cols = self.matrix_shape if len(self.matrix_shape) == 2 else (0, 0)
        all_kappas = self.kappas if self.kappas is not None else (self.kappa,)
        # Rounding, and the orthogonal matrices of version 0.1.0.
        lowest, ends = 1 - 1e-9, (1 + 1e-9) * self.sigma_max
        problem = (
            f"experts={self.experts!r} is unknown" if self.experts not in EXPERTS
            else f"the fingerprint {self.fingerprint!r} is none" if not _FINGERPRINT.fullmatch(self.fingerprint)
            else "it has figures for different numbers of matrices"
            if len({None if stack is None else len(stack) for stack in stacks}) > 1 or not count
            else f"matrix_shape={self.matrix_shape} is no shape of a matrix" if len(self.matrix_shape) != 2
            else f"{count} of shape {self.matrix_shape} do not make up shape={self.shape}"
            if count * rows * cols != self.num_parameters
            else f"κ is below 1: {min(all_kappas)}" if min(all_kappas) < lowest
            else f"kappa={self.kappa} is not the {self.experts} of its kappas"
            if self.kappas is not None and not _close(self.kappa, self.combine(self.kappas))
            else f"sigma_min={self.sigma_min} is not between 0 and sigma_max={self.sigma_max}"
            if not 0 <= self.sigma_min <= ends
            else f"frobenius_norm={self.frobenius_norm} or rtol={self.rtol} is negative"
            if min(self.frobenius_norm, self.rtol, *(self.sigma_maxs or ()), *(self.frobenius_norms or ())) < 0
            else None
        )  # fmt: skip
        if problem is not None:
            raise ValueError(f"the row of {self.name!r} makes no sense: {problem}")


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(key, value)
    return value


def _number(key: str, value: Any) -> float:
    value = decode(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(key, value)
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"a row has a number in {key} that no float can hold") from error
    if math.isnan(number):
        raise _wrong_type(key, value)
    return number


def _sizes(key: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(_list(key, value))
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise _wrong_type(key, value)
    return sizes


def _list(key: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong_type(key, value)
    return value


def _wrong_type(key: str, value: Any) -> ValueError:
    return ValueError(f"a row has an entry of the wrong type: {key} is {reprlib.repr(value)}")


def _close(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=1e-9)
