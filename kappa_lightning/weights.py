"""Which parameters of a model are matrices, and how each is viewed as one.

A parameter is a *matrix* if it is the weight of a Linear, Embedding or Conv layer, or any other parameter in which at
least two dimensions are larger than one (fused experts, attention projections that are bare parameters, position
embeddings). Everything else is a *vector*: biases, the parameters of normalisation layers, gains, class tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

_NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRIX_LAYERS = (nn.Linear, nn.Embedding, nn.EmbeddingBag, _ConvNd)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One parameter that is a matrix, or a stack of matrices, under its first name.

    Attributes:
        name: the name that ``named_parameters()`` gives it; of a tied weight, the first one.
        parameter: the parameter itself, of any shape.
        layer: the module that owns it.
    """

    name: str
    parameter: nn.Parameter
    layer: nn.Module

    @property
    def is_stack(self) -> bool:
        """Whether the parameter holds several matrices, such as the fused experts of one layer."""
        return self.parameter.ndim == 3 and not isinstance(self.layer, _ConvNd) and self.parameter.shape[0] > 1

    def matrices(self) -> Tensor:
        """The weight as the matrices that act on its inputs.

        A Conv kernel becomes (1, out, in·kh·kw), one row for each output channel, whatever the layout that the layer
        stores; a 3-D parameter of any other layer, such as fused experts, is (count, rows, cols).

        Returns:
            Shape (count, rows, cols), the parameter's dtype and device; a view of its storage where strides allow.

        Raises:
            TypeError: if the weight is not stored as real floating-point numbers (a quantised one).
            ValueError: if it has no values yet (a meta tensor or the parameter of a lazy layer).
        """
        weight = self.parameter.detach()
        if isinstance(self.parameter, UninitializedParameter):
            raise ValueError(
                f"{self.name} belongs to a lazy layer and has no shape yet: run one batch through it first"
            )
        if weight.is_meta:
            raise ValueError(f"{self.name} is on the meta device and has no values: load the model's weights first")
        if not weight.is_floating_point():
            raise TypeError(
                f"{self.name} is stored as {weight.dtype} ({type(self.parameter).__name__}, shape "
                f"{tuple(weight.shape)}), a quantised weight that cannot be read: exclude it by name, or load the "
                "model unquantised"
            )
        if isinstance(self.layer, _ConvTransposeNd):
            # Stored as (in, out/groups, k…): bring the output channels of each group to the front.
            groups, (inputs, outputs) = self.layer.groups, weight.shape[:2]
            grouped = weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2)
            return grouped.reshape(1, groups * outputs, -1)
        if isinstance(self.layer, _ConvNd) or weight.ndim > 3:
            return weight.flatten(1).unsqueeze(0)
        return weight if weight.ndim == 3 else weight.unsqueeze(0)


def find_weights(module: nn.Module) -> list[Weight]:
    """All matrices of a module, tied ones once under their first name, in the order of ``named_parameters()``.

    Args:
        module: any module; a parameter counts whether or not it requires a gradient.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(weight.name, tuple(weight.matrices().shape)) for weight in find_weights(net)]
        [('0.weight', (1, 8, 75)), ('3.weight', (1, 2, 8))]
    """
    return [Weight(*owned) for owned in _owned(module) if _is_matrix(*owned)]


def match_names(names: Iterable[str], patterns: Sequence[str], *, argument: str, aliases: dict[str, str]) -> set[str]:
    """The names that at least one shell glob matches; a glob that matches none is an error.

    Args:
        names: parameter names, as ``named_parameters()`` gives them.
        patterns: globs, in which ``*`` also matches dots.
        argument: the user's name for ``patterns``, for the error message.
        aliases: further names of tied parameters, each with the first name that stands for it.

    Raises:
        TypeError: if ``patterns`` is a bare string, whose letters would each count as a pattern.
        ValueError: if a pattern matches no name.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{argument}={patterns!r} is one string: give a list or tuple of globs, such as [{patterns!r}]")
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            tied = [(alias, first) for alias, first in aliases.items() if fnmatchcase(alias, pattern)]
            hint = (
                f"it matches {tied[0][0]}, which is tied to {tied[0][1]}: use that name"
                if tied
                else f"the model's parameters are named like {_some(names)}"
            )
            raise ValueError(f"{argument}: the pattern {pattern!r} matches no parameter; {hint}")
        matched |= hits
    return matched


def tied_names(module: nn.Module) -> dict[str, str]:
    """For every further name of a tied parameter, the first name, which stands for it.

    Example:
        >>> from torch import nn
        >>> net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        >>> net["head"].weight = net["embed"].weight
        >>> tied_names(net)
        {'head.weight': 'embed.weight'}
    """
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}


def _owned(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    layers = dict(module.named_modules(remove_duplicate=False))
    for name, parameter in module.named_parameters():
        yield name, parameter, layers[name.rpartition(".")[0]]


def _is_matrix(name: str, parameter: nn.Parameter, layer: nn.Module) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return isinstance(layer, _MATRIX_LAYERS) and name.endswith("weight")
    # The biases of fused experts are stacked into two dimensions; they are still vectors.
    if name.endswith("bias") or isinstance(layer, _NORMALISATION):
        return False
    if isinstance(layer, _MATRIX_LAYERS) and parameter.ndim >= 2:
        return True
    return sum(size > 1 for size in parameter.shape) >= 2


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
