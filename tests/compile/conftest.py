"""Tuned choices of a test stay in the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stripe_kernels import plan


@pytest.fixture(autouse=True)
def own_tune_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A cache folder of the test's own, and a planner that forgets."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder / "stripe_kernels/tune"
    plan.forget()
