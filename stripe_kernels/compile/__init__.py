"""Whole networks: freeze, optimize, tune, explain, save, load, export."""

from __future__ import annotations

from stripe_kernels.compile.checkpoints import plain_state
from stripe_kernels.compile.explain import explain
from stripe_kernels.compile.export import export_onnx, to_dense
from stripe_kernels.compile.files import example_input, load, save
from stripe_kernels.compile.freeze import UnchangedWarning, freeze
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import optimize
from stripe_kernels.compile.tune import tune

__all__ = [
    "Network",
    "UnchangedWarning",
    "example_input",
    "explain",
    "export_onnx",
    "freeze",
    "load",
    "optimize",
    "plain_state",
    "save",
    "to_dense",
    "tune",
]
