"""What a stage has found so far, one line of JSON each, so that neither a hang nor a crash takes it along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Lines are {"kind": ..., ...}; every one is in the file when `note` returns. Without a file nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def note(self, kind: str, **fields: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The whole ones of a kind: a killed process may leave half a line."""
        found = []
        if self.path is not None and self.path.exists():
            for text in self.path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if line["kind"] == kind:
                    found.append(line)
        return found

    def unfinished(self, begun: str, ended: str) -> list[Any]:
        """`what` of every line "begun" that has no line "ended": what a process died of."""
        over = [line["what"] for line in self.lines(ended)]
        return [line["what"] for line in self.lines(begun) if line["what"] not in over]
