"""One module a backend. Importing a backend registers its kernels; one that cannot be imported leaves its reason."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from stripe_kernels import registry

_MODULES = ("dense", "reference", "cpu", "cuda", "gemm", "triton")
_loaded = False
_loading = threading.Lock()


def load() -> None:
    """Imports every backend once; threads that come meanwhile wait until all kernels are there."""
    global _loaded
    if _loaded:
        return
    with _loading:
        if _loaded:
            return
        for name in _MODULES:
            try:
                importlib.import_module(f"stripe_kernels.backends.{name}")
            except ImportError as error:
                registry.register_missing(name, str(error))
        _loaded = True


def lane_network(threads: int, vectors: int) -> Any:
    """An empty native network on batch lanes, in blocks of `vectors` vectors of images; ImportError where the CPU
    extension is missing."""
    from stripe_kernels.backends.cpu_network import LaneNetwork

    return LaneNetwork(threads, vectors)


def call_list(threads: int) -> Any:
    """An empty list of native calls; ImportError where the CPU extension is missing."""
    from stripe_kernels.backends.cpu_calls import CallList

    return CallList(threads)


def lists_take(runner: Any) -> bool:
    """Whether such a list can call a kernel's runner."""
    try:
        from stripe_kernels.backends.cpu_calls import CallList
    except ImportError:
        return False
    return CallList.takes(runner)


def guard(*call: Any) -> Any:
    """A function where nothing but it is needed (cpu_calls.guard), or None."""
    try:
        from stripe_kernels.backends.cpu_calls import guard
    except ImportError:
        return None
    return guard(*call)
