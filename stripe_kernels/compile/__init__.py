"""Whole networks: freeze, optimize, tune, explain, save, load, export."""

from __future__ import annotations

from stripe_kernels.compile.files import load, save
from stripe_kernels.compile.freeze import freeze, to_dense

__all__ = ["freeze", "load", "save", "to_dense"]
