"""What a parameter's name says of its place: how deep it is, and which role it plays there."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def depth_and_role(name: str) -> tuple[int | None, str]:
    """The layer's index, and the name with the index of the layer and of any expert left out.

    Returns:
        The first number in the name (``None`` if there is none), and the name with ``*`` for every number.

    Example:
        >>> depth_and_role("model.layers.11.mlp.experts.3.up_proj.weight")
        (11, 'model.layers.*.mlp.experts.*.up_proj.weight')
        >>> depth_and_role("embed_tokens.weight")
        (None, 'embed_tokens.weight')
    """
    first = _NUMBER.search(name)
    return (int(first.group()) if first else None), _NUMBER.sub("*", name)
