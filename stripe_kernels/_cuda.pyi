"""csrc/bindings/cuda.cpp: its one importer checks what it passes; the binding checks it again."""

from typing import Any

def __getattr__(name: str) -> Any: ...
