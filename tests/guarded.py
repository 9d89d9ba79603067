"""Tensors whose neighbouring pages cannot be read or written: one byte too far ends the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_NONE, _READ, _READ_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE


def _protect(address: int, size: int, protection: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


@contextmanager
def guarded(t: Tensor, end: bool, writable: bool = False) -> Iterator[Tensor]:
    """t's values and strides in memory that ends (or begins) exactly at a forbidden page."""
    page, item = mmap.PAGESIZE, t.element_size()
    span = (
        1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if t.numel()
        else 0
    )
    inner = -(-max(span * item, 1) // page) * page
    with mmap.mmap(-1, inner + 2 * page) as area:
        view = (ctypes.c_char * (inner + 2 * page)).from_buffer(area)
        base = ctypes.addressof(view)
        start = page + (inner - span * item if end else 0)
        flat = torch.frombuffer(
            area, dtype=t.dtype, count=max(span, 1), offset=min(start, page + inner - item)
        )
        copy = flat[:span].as_strided(t.shape, t.stride()) if span else flat[:0].view(t.shape)
        if span:  # gaps too: an expanded view cannot be written element by element
            flat[:span].copy_(t.as_strided((span,), (1,)))
        _protect(base, page, _NONE)
        _protect(base + page, inner, _READ_WRITE if writable else _READ)
        _protect(base + page + inner, page, _NONE)
        try:
            yield copy
        finally:
            _protect(base, inner + 2 * page, _READ_WRITE)
            del copy, flat, view
