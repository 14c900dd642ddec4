"""The weights of a checkpoint by the names and shapes of its tensors alone, where nothing says what its layers are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping

import torch

from kappa_lightning.weights.checkpoint.named_norms import made_weight
from kappa_lightning.weights.checkpoint.stored import Stored
from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.weight import Weight, as_convolution, is_matrix_shape, view_of

_NORM = re.compile(r"norm\d*\.weight$|(?:^|[._])ln_?\w?\.weight$", re.IGNORECASE)
_RECURRENT = re.compile(r"(?:^|[._])weight_(?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?$|in_proj_weight$")


def assumed_weights(source: str, tensors: Mapping[str, Stored], reason: str) -> list[Weight]:
    """The matrices of a checkpoint, as far as names and shapes tell.

    A warning says what tensors of three and more dimensions were taken for: no name tells a transposed convolution from
    another.

    Args:
        source: the file or folder, for the warning.
        tensors: what it holds.
        reason: why nothing says what the layers are.
    """
    weights = list(_weights(tensors))
    kinds = {"convolution": "convolutions with their outputs first", "stack": "stacks of matrices, such as experts"}
    taken = {
        kind: [weight.name for weight in weights if len(weight.shape) > 2 and weight.layout == kind] for kind in kinds
    }
    if any(taken.values()):
        said = [f"{len(names)} as {kinds[kind]} ({names[0]} first)" for kind, names in taken.items() if names]
        warnings.warn(
            f"{source}: {reason}. Tensors of more than two dimensions are read by their names and shapes, "
            f"{' and '.join(said)}; for a transposed convolution that is wrong. KappaProfile.from_model reads each as "
            "its layer does",
            stacklevel=5,
        )
    return weights


def _weights(tensors: Mapping[str, Stored]) -> Iterator[Weight]:
    made = {name: weight for name in tensors if (weight := made_weight(name, tensors)) is not None}
    companions = {name for weight in made.values() for name in weight.companions}
    for name, tensor in tensors.items():
        weight = made.get(name) or (None if plain_name(name) in companions else _plain(tensor))
        if weight is not None:
            yield weight


def _plain(tensor: Stored) -> Weight | None:
    name, shape = plain_name(tensor.name), tensor.shape
    if tensor.refusal is None and not (tensor.has_values and _is_matrix(name, shape)):
        return None
    view = as_convolution if len(shape) == 3 and "conv" in name.lower() else view_of(shape)
    return Weight(name, shape, tensor.dtype or torch.uint8, tensor.read, view, refusal=tensor.refusal)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """The rule of :func:`kappa_lightning.weights.layers.is_matrix`, as far as names tell of layers."""
    if 0 in shape or _NORM.search(name):
        return False
    if len(shape) == 2 and (name.rpartition(".")[2] == "weight" or _RECURRENT.search(name)):
        return True  # of a Linear, an Embedding or a recurrent layer, even if one of its dimensions is 1
    if len(shape) > 2 and name.rpartition(".")[2] == "weight" and shape[0] * shape[1] > 1:
        return True  # of a convolution, even if it is of 1 × 1 and to one channel
    return is_matrix_shape(name, shape)
