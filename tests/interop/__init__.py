"""Other tools hand over what they pruned, and take what we made: the real packages where they install."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


def needed(name: str) -> ModuleType:
    """The package, or a skip that says why it cannot be imported; torchvision's operators fail with RuntimeError."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")
