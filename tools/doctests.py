"""Griffe's extension: docstrings as Markdown. An example, ``>>> ..`` up to a blank line, is a block of code; a role is code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|meth|data):`~?([^`]+)`")
BLOCK = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = BLOCK.sub(lambda block: f"```pycon\n{block[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", text)
