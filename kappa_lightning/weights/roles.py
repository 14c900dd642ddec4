"""What a parameter's name says of its place: how deep it is, and which role it plays there."""

from __future__ import annotations

import re

from kappa_lightning.weights.part import split_name

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
# The names under which models keep their repeated layers; torchvision joins name and number.
_LAYER = re.compile(r"(?:^|\.)(?:\w*_)?(?:layers?|blocks?|h|resblocks|stages?)[._](\d+)(?=\.)")
_JOINED = re.compile(r"(?<=layer_)\d+(?=\.)")


def depth_and_role(name: str) -> tuple[int | None, str]:
    """The layer's index, and the name with the index of the layer, of any expert and of any head left out.

    Returns:
        The number behind the first word such as ``layers`` or ``blocks``, or else the first number (``None`` if there
        is none); and the name with ``*`` for every number.

    Example:
        >>> depth_and_role("model.layers.11.mlp.experts.3.up_proj.weight")
        (11, 'model.layers.*.mlp.experts.*.up_proj.weight')
        >>> depth_and_role("model.layers.11.mlp.experts.up_proj[3]")
        (11, 'model.layers.*.mlp.experts.up_proj')
        >>> depth_and_role("embed_tokens.weight")
        (None, 'embed_tokens.weight')
    """
    name, _ = split_name(name)
    numbered = _LAYER.search(name)
    first = _NUMBER.search(name)
    depth = int(numbered.group(1)) if numbered else int(first.group()) if first else None
    return depth, _JOINED.sub("*", _NUMBER.sub("*", name))


def start_of_layers(name: str) -> int | None:
    """Where the word is, such as ``layers`` or ``blocks``, under which a name's repeated layer is kept.

    Returns:
        Its place in the name; ``None`` if there is no such word with a number behind it.

    Example:
        >>> start_of_layers("model.layers.11.mlp.up_proj.weight"), start_of_layers("lm_head.weight")
        (6, None)
    """
    found = _LAYER.search(name)
    return None if found is None else found.start() + name[found.start() :].startswith(".")
