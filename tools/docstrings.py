"""Docstrings as markdown for the API page: doctests become code, `name  what it is` lines a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*\n(?:(?!>>> |\n).+\n)*)+", re.MULTILINE)
_NAMED = re.compile(r"^(\w+)  +(?=\S)", re.MULTILINE)


def markdown(text: str) -> str:
    fenced = _DOCTEST.sub(lambda found: f"\n```pycon\n{found[0]}```\n", text + "\n")
    parts = re.split(r"(```.*?```)", fenced, flags=re.DOTALL)
    # [R][S] is a shape, not a link.
    parts[::2] = [_NAMED.sub(r"- `\1`: ", part).replace("][", r"]\[") for part in parts[::2]]
    return "".join(parts)


class Docstrings(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
