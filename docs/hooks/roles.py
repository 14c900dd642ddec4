"""Makes docstrings ready for the site.

Sphinx roles become links where the site has the target, and code elsewhere; an ``Example:`` is shown as code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(
    r":(?:class|func|meth|mod|data|attr|exc):`(?:(?P<text>[^`<]+?)\s*<(?P<target>[^`>]+)>|(?P<name>[^`]+))`"
)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    """For each object that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite its docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _link(role, obj), obj.docstring.value)
            # Of this heading alone the parser makes a section of code.
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)


def _link(role: re.Match[str], obj: griffe.Object) -> str:
    name = role["target"] or role["name"]
    plain = name.lstrip("~")
    text = role["text"] or (plain.rpartition(".")[2] if name.startswith("~") else plain)
    target = plain if "." in plain else _resolved(plain, obj)
    return f'<autoref identifier="{target}" optional><code>{text}</code></autoref>'


def _resolved(name: str, obj: griffe.Object) -> str:
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
