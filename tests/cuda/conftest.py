from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.cuda import emulated


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """stripe_kernels._cuda for the CPU, with fibers for threads."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("building the emulated extension needs pybind11")
    return emulated.load(emulated.build())
