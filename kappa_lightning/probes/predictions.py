"""What an arbitrary module says of a batch, where it can be told without the user's help."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.probes.logits import has_no_forward, transformers_model
from kappa_lightning.probes.output import Bernoulli, Categorical, OutputDistribution

_HELP = (
    "say how with a method output_distribution(self, batch) of the module, or with a function (module, batch) as "
    "output= of kappa_lightning.probes.ReferenceInputs or TaskInputs, given as reference=; both return a distribution "
    "of kappa_lightning.probes.output: Gaussian(self(batch[0]), scale) for a regression, Categorical, Bernoulli, "
    "similarity or Joint"
)
_LABELS = ("labels", "label", "target", "targets", "y")


def predictions(module: nn.Module, batch: Any) -> OutputDistribution:
    """The output distribution of a module for a batch, labels or not.

    - *A mapping:* the transformers model in the module that returns logits, or else the module itself, is called with
      those entries that it takes. Of a causal model every token that is attended to counts, but for those that stand
      for an image; of an encoder-decoder every label.
      A module whose forward takes the mapping itself gets that.
    - *A sequence or a tensor:* the module is called with the first entry, or with as many of the first ones as its
      forward requires where a label follows them.

    What a module returns is taken for the logits of a softmax if the batch's labels can be the numbers of its classes:
    integers of the outputs' shape without one dimension, the last or the second, which is that of the classes. All of
    them count classes from 0, but for one number that says that a label is to be ignored. A batch without labels says
    nothing, and the last dimension is taken for classes: for a regression, say what it means.

    Raises:
        TypeError: if the module has no forward of its own or one that takes other arguments, returns no logits, or the
            labels are no classes (floating-point numbers, or of the outputs' own shape, as a regression of several
            outputs has them), so that the outputs may be anything.
    """
    if isinstance(batch, Mapping):
        return _of_mapping(module, batch)
    if has_no_forward(module):
        raise TypeError(
            f"{type(module).__name__} defines no forward, so what it says of a batch is not known: define it, or "
            f"{_HELP}"
        )
    entries = list(batch) if isinstance(batch, Sequence) else [batch]
    count = max(1, _num_required(module))
    if count > 1 and count >= len(entries):
        raise _does_not_take(module, f"a batch of {len(entries)} entries, labels among them,")
    inputs, labels = entries[:count], entries[count] if count < len(entries) else None
    if not _takes(module, *inputs):
        raise _does_not_take(module, f"the batch's first {count} entries" if count > 1 else "the batch's first entry")
    return _of_logits(module, _logits(module, module(*inputs)), labels)


def _of_mapping(module: nn.Module, batch: Mapping[str, Any]) -> OutputDistribution:
    model = transformers_model(module)
    if model is None:
        if has_no_forward(module):
            raise TypeError(
                f"{type(module).__name__} neither holds a transformers model that returns logits nor defines a "
                f"forward, so what it says of a batch is not known: {_HELP}"
            )
        # A forward that cannot do without y has it for an input.
        names = [name for name in _LABELS if name in batch and not (name == "y" and _requires(module, name))]
        labels = batch[names[0]] if names else None
        inputs = {k: v for k, v in batch.items() if k not in names}
        if _takes(module, **inputs):
            return _of_logits(module, _logits(module, module(**inputs)), labels)
        if _num_required(module) == 1 and _takes(module, batch):
            return _of_logits(module, _logits(module, module(batch)), labels)
        raise _does_not_take(module, f"the batch's entries {', '.join(map(str, inputs))} as keyword arguments")
    config = model.config
    decoded = config.is_encoder_decoder
    labels = batch.get("labels")
    inputs = _taken(model, batch, but=() if decoded else ("labels",))
    logits = _logits(model, model(**inputs))
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return Bernoulli(logits)
    if problem == "regression" or (logits.ndim == 2 and logits.shape[-1] == 1):
        raise TypeError(f"{type(model).__name__} is a regression, whose scale is not known: {_HELP}")
    if logits.ndim == 3:
        counts = _counted(config, batch, labels if decoded else None, logits.shape[:2])
        return Categorical(logits, None if counts is None else counts.to(logits.device))
    return _of_logits(model, logits, labels)


def _counted(config: Any, batch: Mapping[str, Any], labels: Tensor | None, shape: torch.Size) -> Tensor | None:
    if labels is not None:
        return labels != -100
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    counts = None
    if isinstance(mask, Tensor) and mask.shape == shape:
        counts = mask.bool()
    if isinstance(ids, Tensor) and ids.shape == shape:
        for name in ("image_token_id", "image_token_index"):
            token = getattr(config, name, None)
            if token is not None:
                counts = (ids != token) if counts is None else counts & (ids != token)
    return counts


def _taken(model: nn.Module, batch: Mapping[str, Any], but: Sequence[str]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {k: v for k, v in batch.items() if k not in but and (anything or k in parameters)}


def _takes(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a scripted forward has no signature
        return True
    return True


def _num_required(module: nn.Module) -> int:
    """How many positional arguments a module's forward cannot do without."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except ValueError:
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _requires(module: nn.Module, name: str) -> bool:
    try:
        parameter = inspect.signature(module.forward).parameters.get(name)
    except ValueError:
        return False
    return parameter is not None and parameter.default is parameter.empty


def _does_not_take(module: nn.Module, what: str) -> TypeError:
    signature = inspect.signature(module.forward)
    return TypeError(f"the forward of {type(module).__name__} takes {signature}, and not {what}: {_HELP}")


def _logits(module: nn.Module, output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TypeError(f"the forward of {type(module).__name__} returned {found}, which are no logits: {_HELP}")
    return logits


def _of_logits(module: nn.Module, logits: Tensor, labels: Any) -> Categorical:
    if logits.shape[-1] == 1:
        raise TypeError(f"{type(module).__name__} has one output, which is no softmax: {_HELP}")
    if labels is None:
        return Categorical(logits)
    if isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex():
        found = None
        if labels.shape == logits.shape[:-1]:
            found = Categorical(logits)
        elif labels.shape == logits.shape[:1] + logits.shape[2:]:
            found = Categorical(logits.movedim(1, -1))
        if found is not None:
            _require_class_numbers(module, labels, found.logits.shape[-1])
            return found
    what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise TypeError(
        f"{type(module).__name__} returns {tuple(logits.shape)} and the batch's labels are {what}, so its outputs are "
        f"not the logits of a softmax over classes: {_HELP}"
    )


def _require_class_numbers(module: nn.Module, labels: Tensor, classes: int) -> None:
    others = labels[(labels < 0) | (labels >= classes)]
    if len(others) and (low := int(others.min())) != (high := int(others.max())):
        raise TypeError(
            f"{type(module).__name__} has {classes} outputs and the batch's labels hold {low} and {high}, "
            f"which are no numbers of {classes} classes, so its outputs are not the logits of a "
            f"softmax over them: {_HELP}"
        )
