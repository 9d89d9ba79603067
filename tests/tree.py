"""What a test may find around it: the sources and a compiler. The tests of an installed wheel have neither."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "c++")

# Why a test cannot have it; empty where it can.
NO_SOURCES = "" if (ROOT / "setup.py").is_file() else "the project's sources are not beside the tests"
NO_COMPILER = "" if shutil.which(shlex.split(CXX)[0]) else f"no compiler: {CXX}"

needs_sources = pytest.mark.skipif(bool(NO_SOURCES), reason=NO_SOURCES)
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)
