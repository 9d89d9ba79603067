"""Refuses sub-interpreters: torch keeps one state for the whole process, and importing it into a second interpreter
hangs (2.13 on Python 3.11). Imported first, before torch."""

from __future__ import annotations


def _main() -> bool:
    try:
        import ctypes
    except ImportError as error:
        if "subinterpreters" in str(error):  # CPython 3.12 has no ctypes there
            return False
        raise
    api = ctypes.pythonapi
    here, main = api.PyInterpreterState_Get, api.PyInterpreterState_Main
    here.restype = main.restype = ctypes.c_void_p
    return bool(here() == main())


if not _main():
    raise ImportError(
        "stripe_kernels runs in the main interpreter only: torch, which it needs, has one state a process"
    )
