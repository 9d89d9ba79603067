from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.cuda import emulated
from tests.tree import NO_COMPILER, NO_SOURCES


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """stripe_kernels._cuda for the CPU, with fibers for threads."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("building the emulated extension needs pybind11")
    if reason := NO_SOURCES or NO_COMPILER:
        pytest.skip(reason)
    return emulated.load(emulated.build())
