"""One weight: its name, how to read it, and how it is viewed as matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kappa_lightning.fingerprint import fingerprint, fingerprint_of_sources
from kappa_lightning.weights.part import Part
from kappa_lightning.weights.sharded import is_sharded

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A parameter that is a matrix, or a stack of matrices, under its first name.

    Attributes:
        name: the name that ``named_parameters()`` gives it, without the prefix of ``torch.compile``; of a tied
            weight, the first one; in a checkpoint, the name there.
        shape: its shape; of a quantized weight, the shape that it stands for.
        dtype: its stored precision.
        read: returns the whole tensor, dequantized if need be, and collected from all processes if it is sharded.
        view: turns that tensor into matrices.
        parameter: the parameter, if the weight is a model's.
        companions: the names of further parameters that the weight is made from, where it is parametrized.
        makers: if reading it computes it (a parametrization, a norm of the weight), all parameters that it is made
            from, ``parameter`` among them.
        part: which part of the parameter it is, if it is not the whole.
        parts: parameters that lie in its memory and train in its stead (:func:`kappa_lightning.parts.train_parts`).
        refusal: why a checkpoint's weight cannot be read, if it cannot.
        sources: if reading it computes it, returns all that it is computed from, buffers such as a mask included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    view: View
    parameter: nn.Parameter | None = None
    companions: tuple[str, ...] = ()
    makers: tuple[nn.Parameter, ...] = ()
    part: Part | None = None
    parts: tuple[nn.Parameter, ...] = ()
    refusal: str | None = None
    sources: Callable[[], tuple[Tensor, ...]] | None = None

    @property
    def is_stack(self) -> bool:
        """Whether it holds several matrices, such as the fused experts of one layer."""
        return self.view is as_stack and self.shape[0] > 1

    @property
    def is_made(self) -> bool:
        """Whether reading it computes it."""
        return bool(self.makers)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What it is made from; of a checkpoint's weight, nothing."""
        return self.makers or (() if self.parameter is None else (self.parameter, *self.parts))

    @property
    def is_trainable(self) -> bool:
        """Whether something that it is made from requires a gradient, so that training moves it."""
        return any(parameter.requires_grad for parameter in self.parameters)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of it, so that all must read it together."""
        return any(is_sharded(parameter) for parameter in self.parameters)

    @property
    def layout(self) -> str:
        """How :meth:`matrices` reads it: as a matrix, a stack, a convolution or a transposed one."""
        if isinstance(self.view, partial) and self.view.func is as_transposed_convolution:
            return f"transposed convolution of {self.view.keywords['groups']} group(s)"
        return "matrix" if self.view is as_matrix else "stack" if self.view is as_stack else "convolution"

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        """(count, rows, cols) of :meth:`matrices`, without reading the weight; a ValueError if it has no shape yet."""
        if not self.shape:
            return tuple(self.matrices().shape)  # type: ignore[return-value] # a lazy layer's, which says what to do
        count, rows, cols = self.view(torch.empty(self.shape, device="meta")).shape
        return count, rows, cols

    @property
    def cost(self) -> int:
        """What a decomposition costs, in units of count · rows · cols · min(rows, cols)."""
        if not self.shape:
            return 1  # a lazy layer's, which will be refused when it is read
        count, rows, cols = self.stack_shape
        return count * rows * cols * min(rows, cols)

    def fingerprint(self) -> str:
        """Identifies what is stored, on every device; where reading rounds, that is all that is computed with."""
        return self.identifier(None if self.sources is not None else self.read())()

    def identifier(self, read: Tensor | None) -> Callable[[], str]:
        """Computes :meth:`fingerprint` later, from what was read; reads what else it needs now."""
        if self.sources is not None:
            return partial(fingerprint_of_sources, self.sources())
        assert read is not None
        return partial(fingerprint, read)

    def matrices(self) -> Tensor:
        """The weight as the matrices that act on its inputs.

        A Conv kernel becomes (1, out, in·kh·kw), one row for each output channel, whatever the layout that the layer
        stores; a 3-D parameter of any other layer, such as fused experts, is (count, rows, cols).

        Returns:
            Shape (count, rows, cols), where the weight is; a view of its storage where strides allow.

        Raises:
            TypeError: if the weight is quantized in a way that cannot be read.
            ValueError: if it has no values yet (a meta tensor or the parameter of a lazy layer).
        """
        return self.view(self.read())


def as_matrix(weight: Tensor) -> Tensor:
    """(rows, cols) → (1, rows, cols)."""
    return weight.unsqueeze(0)


def as_stack(weight: Tensor) -> Tensor:
    """(count, rows, cols), as it is."""
    return weight


def as_convolution(weight: Tensor) -> Tensor:
    """(out, in, k…) → (1, out, in·k…)."""
    return weight.flatten(1).unsqueeze(0)


def as_transposed_convolution(weight: Tensor, groups: int) -> Tensor:
    """(in, out/groups, k…) → (1, out, in/groups·k…)."""
    inputs, outputs = weight.shape[:2]
    grouped = weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2)
    return grouped.reshape(1, groups * outputs, -1)


def view_of(shape: tuple[int, ...]) -> View:
    """The view of a weight of which only the shape is known."""
    return {2: as_matrix, 3: as_stack}.get(len(shape), as_convolution)


def is_matrix_shape(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of which only name and shape are known is a matrix."""
    # The biases of fused experts are stacked into two dimensions; they are still vectors. The decay rates of
    # state-space layers (Mamba, Jamba) have a row for each channel, and act entry by entry.
    return not name.endswith(("bias", "A_log")) and sum(size > 1 for size in shape) >= 2
