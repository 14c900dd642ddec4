"""A model or a checkpoint as its weight matrices, each a (count, rows, cols) view with a name.

A parameter is a *matrix* if it is the weight of a Linear, Embedding or Conv layer, or any other parameter in which at
least two dimensions are larger than one (fused experts, attention projections that are bare parameters, position
embeddings). Everything else is a *vector*: biases, the parameters of normalization layers, gains, class tokens.
"""

from kappa_lightning.weights.checkpoint import checkpoint_weights
from kappa_lightning.weights.model import find_weights
from kappa_lightning.weights.names import plain_parameters, tied_names
from kappa_lightning.weights.patterns import check_patterns, included, included_by_name, match_names, match_parameters
from kappa_lightning.weights.weight import Weight

__all__ = [
    "Weight",
    "check_patterns",
    "checkpoint_weights",
    "find_weights",
    "included",
    "included_by_name",
    "match_names",
    "match_parameters",
    "plain_parameters",
    "tied_names",
]
