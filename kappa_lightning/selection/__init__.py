"""From the rows of a profile and a budget to the names of the tensors that train.

A criterion gives each row a score, the lowest scores train first, and the budget says how far down the ranking to go.
"""

from kappa_lightning.selection.budget import DEFAULT_TOP_P, Budget
from kappa_lightning.selection.criteria import (
    CRITERIA,
    Criterion,
    Matrix,
    Scorable,
    criterion_of,
    per_matrix,
    register,
    register_criterion,
)
from kappa_lightning.selection.expected_kappa import expected_log_kappa
from kappa_lightning.selection.ranking import GROUPINGS, check_ranking, parameters_allowed, rank, select, take

__all__ = [
    "CRITERIA",
    "DEFAULT_TOP_P",
    "GROUPINGS",
    "Budget",
    "Criterion",
    "Matrix",
    "Scorable",
    "check_ranking",
    "criterion_of",
    "expected_log_kappa",
    "parameters_allowed",
    "per_matrix",
    "rank",
    "register",
    "register_criterion",
    "select",
    "take",
]
