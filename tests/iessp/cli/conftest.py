"""Tests of the command line: timings that decide nothing, a folder with a user's module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import stripe_kernels
from iessp import cli_work, dense
from tests.iessp.cli.run import FACTORIES


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that decide nothing here take the least time they can."""
    optimizer = importlib.import_module("stripe_kernels.compile.optimize")
    monkeypatch.setattr(optimizer, "_RACE_SECONDS", 0.01)
    monkeypatch.setattr(optimizer, "tune", partial(stripe_kernels.tune, seconds=0.0))
    monkeypatch.setattr(cli_work, "TUNE_SECONDS", 1e-3)
    monkeypatch.setattr(dense, "_NEEDS", {})  # exports take seconds; test_dense.py has them


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty working directory with a user's module in it, and a cache of choices of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "factories_of_a_user.py").write_text(FACTORIES)
    yield tmp_path
    sys.modules.pop("factories_of_a_user", None)
