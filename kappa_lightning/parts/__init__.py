"""Parts of a parameter that train while its rest is frozen: single experts of a fused tensor, heads of a projection."""

from kappa_lightning.parts.find import GATE_UP, split_into_parts
from kappa_lightning.parts.training import PartialTraining, divided, store_parts, train_parts
from kappa_lightning.weights.part import Part, expert_parts, gate_up_parts, head_parts

__all__ = [
    "GATE_UP",
    "Part",
    "PartialTraining",
    "divided",
    "expert_parts",
    "gate_up_parts",
    "head_parts",
    "split_into_parts",
    "store_parts",
    "train_parts",
]
