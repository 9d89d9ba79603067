"""Tuned choices of a test stay in the test."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from stripe_kernels import plan


@pytest.fixture(autouse=True)
def own_tune_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A cache folder of the test's own, kept on busy cores too, and a planner that forgets."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(importlib.import_module("stripe_kernels.compile.tune"), "_DISTURBED", float("inf"))
    yield folder / "stripe_kernels/tune"
    plan.forget()
