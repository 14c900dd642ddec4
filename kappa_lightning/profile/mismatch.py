"""Why the rows of a checkpoint may bear other names than the parameters of the model that loads it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SEPARATE = re.compile(r"\bexperts\.\d+\.")
_FUSED = re.compile(r"\bexperts\.(?!\d)")


def fused_experts(row_names: Iterable[str], parameter_names: Iterable[str]) -> str | None:
    """What to say if the profile has experts as separate tensors, and the model has them fused; else ``None``.

    transformers 5 stores each expert of a MoE layer by itself, as ``experts.0.up_proj.weight``, and fuses them when it
    loads them, as ``experts.gate_up_proj``, whose matrices are the gate and the other projection stacked. Their
    condition numbers do not follow from those of the parts.

    Example:
        >>> fused_experts(["mlp.experts.0.up_proj.weight"], ["mlp.experts.0.up_proj.weight"]) is None
        True
        >>> fused_experts(["mlp.experts.0.up_proj.weight"], ["mlp.experts.gate_up_proj"]).partition(":")[2]
        ' their condition numbers differ, so use KappaProfile.from_model'
    """
    separate = next((name for name in row_names if _SEPARATE.search(name)), None)
    fused = next((name for name in parameter_names if _FUSED.search(name)), None)
    if separate is None or fused is None:
        return None
    return (
        f"the profile has the experts of a checkpoint one by one ({separate}), and this model has them fused "
        f"({fused}): their condition numbers differ, so use KappaProfile.from_model"
    )
