"""What a batch says is right, for each distribution of a model's output, and passes without noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.probes.generated import language_model
from kappa_lightning.probes.inputs import ReferenceInputs
from kappa_lightning.probes.logits import class_logits
from kappa_lightning.probes.output import OutputDistribution
from kappa_lightning.probes.perplexity import next_token_labels

NO_TARGET = -1
"""The target of a row that predicts nothing."""


def rows_and_targets(inputs: ReferenceInputs, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The logits of a batch, one row for each distribution that counts, and the class that is right for each.

    A mapping with ``input_ids`` is a language model's: the target of a position is the next token, or the next of
    ``labels`` where that is not −100, and the positions that count are those of ``attention_mask``. Otherwise the
    target is the class label of the sample.

    Args:
        inputs: of which ``output``, if it has one, gives the logits.
        module: any module.
        batch: a mapping, or inputs and labels.

    Returns:
        Shapes (rows, classes) and (rows,); a target is :data:`NO_TARGET` where the batch has none.

    Raises:
        TypeError: if the output is no softmax.
        ValueError: if the batch has no labels of the shape that the logits have.
    """
    scores = _logits(inputs, module, batch)
    targets = _targets(batch, scores)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == scores.shape[:-1]:
        return scores[mask.bool()], targets[mask.bool()]
    return scores.flatten(0, -2), targets.flatten()


def _logits(inputs: ReferenceInputs, module: nn.Module, batch: Any) -> Tensor:
    if inputs.output is not None:
        found = inputs.output(module, batch)
        if isinstance(found, OutputDistribution):
            raise TypeError(
                f"the output is a {type(found).__name__}, whose rows cannot be told from the batch's targets: let "
                "output=… return logits of shape (batch, …, classes), or leave exclude_target and cross_entropy"
            )
        logits = found if isinstance(found, Tensor) else found.logits
    else:
        model = language_model(module) if isinstance(batch, Mapping) else None
        logits = class_logits(module if model is None else model, batch)
    assert isinstance(logits, Tensor)
    return logits


def _targets(batch: Any, scores: Tensor) -> Tensor:
    if isinstance(batch, Mapping) and "input_ids" in batch and scores.ndim == 3:
        following = next_token_labels(batch)
        targets = torch.full(scores.shape[:-1], NO_TARGET, dtype=torch.int64, device=scores.device)
        targets[:, :-1] = following.masked_fill(following < 0, NO_TARGET)
        return targets
    second = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else second
    if not isinstance(labels, Tensor) or labels.shape != scores.shape[:-1] or labels.is_floating_point():
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else "no tensor"
        raise ValueError(
            f"logits of shape {tuple(scores.shape)} need class labels of shape {tuple(scores.shape[:-1])}, and the "
            f"batch has {found}: leave exclude_target and cross_entropy, or give batches (inputs, labels)"
        )
    return labels.masked_fill(labels < 0, NO_TARGET)


@contextmanager
def without_noise(module: nn.Module) -> Iterator[None]:
    """Eval mode for a pass with a gradient, in which layers that recompute their activations still do so.

    transformers checkpoints gradients only in training mode. Such a layer stays in it if it drops nothing itself; what
    it contains is in eval mode in any case.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    for submodule, training in modes.items():
        if getattr(submodule, "gradient_checkpointing", False) is True and not _drops(submodule):
            submodule.training = training
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def _drops(layer: nn.Module) -> bool:
    rates = (value for name, value in vars(layer).items() if "drop" in name)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
