"""Why a profile is not that of a model: other weights, or rows under other names than the model's parameters have."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn

from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.weights import Weight
from kappa_lightning.weights.names import plain_name

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
        ' their condition numbers differ, so use KappaProfile.from_model, or scan it with its config.json beside it'
    """
    separate = next((name for name in row_names if _SEPARATE.search(name)), None)
    fused = next((name for name in parameter_names if _FUSED.search(name)), None)
    if separate is None or fused is None:
        return None
    return (
        f"the profile has the experts of a checkpoint one by one ({separate}), and this model has them fused "
        f"({fused}): their condition numbers differ, so use KappaProfile.from_model, or scan it with its config.json "
        "beside it"
    )


def common_prefixes(names: Sequence[str], row_names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Pairs of prefixes such that every name has a row once the one is replaced by the other, the shortest first.

    Example:
        >>> list(common_prefixes(["net.0.weight", "net.1.weight"], ["module.0.weight", "module.1.weight", "x.weight"]))
        [('net.', 'module.')]
    """
    first = names[0].split(".")
    pairs = set()
    for row_name in row_names:
        row = row_name.split(".")
        same = next((n for n, (a, b) in enumerate(zip(first[::-1], row[::-1], strict=False)) if a != b), None)
        common = min(len(first), len(row)) if same is None else same
        if common:
            pairs.add(tuple("".join(f"{part}." for part in parts[: len(parts) - common]) for parts in (first, row)))
    for of_names, of_rows in sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
        if all(name.startswith(of_names) and of_rows + name.removeprefix(of_names) in row_names for name in names):
            yield of_names, of_rows


def _is_of_before(row: KappaRow, weight: Weight) -> bool:
    """Whether a row has the fingerprint that earlier versions gave a weight whose reading computes it."""
    return weight.sources is not None and fingerprint(weight.read()) == row.fingerprint


def differences(rows: Iterable[KappaRow], weights: Iterable[Weight], module: nn.Module) -> Iterator[str]:
    """Why rows are not those of a module's present weights, tensor by tensor.

    Args:
        rows: of a profile.
        weights: those of the module that have a row in a profile of it.
        module: whose buffers a checkpoint may have had rows for, too.
    """
    by_name = {weight.name: weight for weight in weights}
    buffers = {plain_name(name): tuple(buffer.shape) for name, buffer in module.named_buffers()}
    for row in rows:
        weight = by_name.get(row.name)
        if weight is None:
            if buffers.get(row.name) != row.shape:
                unknown = f"the profile is another model's: it has {row.name}, which this model has not"
                yield fused_experts([row.name], by_name) or unknown
            continue
        shape, dtype = weight.shape, str(weight.dtype).removeprefix("torch.")
        if (shape, dtype) != (row.shape, row.dtype):
            yield (
                f"the profile is another model's: {row.name} is {dtype} of shape {shape} here and {row.dtype} of "
                f"shape {row.shape} in the profile"
            )
        elif row.layout and row.layout != weight.layout:
            yield (
                f"the profile has κ of {row.name} as a {row.layout}, and its layer uses it as a {weight.layout}: "
                "compute the profile from the model, or from a checkpoint with its config.json beside it"
            )
        elif row.matrix_shape != weight.stack_shape[1:]:
            yield (
                f"the profile has κ of {row.name} as matrices of shape {row.matrix_shape}, and its layer uses it "
                f"as {weight.stack_shape[1:]}: compute the profile from the model"
            )
        elif weight.fingerprint() != row.fingerprint and not _is_of_before(row, weight):
            yield f"the profile is of other weights: the content of {row.name} differs; compute a new profile"
