"""From what a user says of a reference to where the model is asked."""

from __future__ import annotations

from typing import Any

from torch import nn

from kappa_lightning.probes.generated import language_model
from kappa_lightning.probes.inputs import GeneratedText, ReferenceInputs, TaskInputs, require_language_model, writes
from kappa_lightning.probes.synthesized import SynthesizedInputs

WORDS = ("generated", "synthesized", "inputs", "auto")
"""What ``reference=`` may be in words."""


FEW = GeneratedText(num_sequences=4, num_tokens=64)
"""Text enough where the model reads all of it once for each tensor."""


def resolve_reference(reference: Any, module: nn.Module, *, few: bool = False) -> ReferenceInputs:
    """What a user means by ``reference=``.

    Args:
        reference: one of :data:`WORDS`, a :class:`ReferenceInputs`, or any dataloader. ``"auto"`` is text of its own,
            if the model can write; otherwise inputs that it synthesizes, if it is a classifier of floating-point
            inputs; otherwise the new task's inputs.
        module: the pretrained model.
        few: whether a word for generated text means :data:`FEW`.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the word is unknown, or the module cannot do what it says.

    Example:
        >>> type(resolve_reference("auto", nn.Linear(2, 2))).__name__
        'SynthesizedInputs'
    """
    if isinstance(reference, ReferenceInputs):
        return reference
    if reference == "auto":
        return _text(few) if writes(language_model(module)) else SynthesizedInputs(required=False)
    if reference == "synthesized":
        return SynthesizedInputs()
    if reference == "inputs":
        return TaskInputs()
    if reference == "generated":
        require_language_model(module)
        return _text(few)
    if isinstance(reference, str):
        raise ValueError(
            f"reference={reference!r} is unknown: use one of {', '.join(map(repr, WORDS))}, a dataloader or "
            "ReferenceInputs"
        )
    return ReferenceInputs(reference)


def _text(few: bool) -> GeneratedText:
    return FEW if few else GeneratedText()
