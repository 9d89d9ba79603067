"""What every CUDA runner does around its launches: device copies of the tables, the stream, split sums.

`native` is the extension stripe_kernels._cuda, or one of the same face: tests build the kernels for the CPU
and run these same classes on CPU tensors. A call launches one kernel, or two where a sum is split; it
allocates from torch's allocator only and never waits, so it may be captured into a CUDA graph after one
call outside (which uploads the tables).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stripe_kernels.backends.cuda_tables import DTYPES, Layout, Tables
from stripe_kernels.indices import IndexArrays
from stripe_kernels.packed import Int32Array
from stripe_kernels.registry import Problem

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def float32(values: Tensor | None) -> Tensor | None:
    """Of an epilogue's scale or shift, as the kernels read it."""
    return None if values is None else values.float().contiguous()


class CudaRunner:
    """One kernel with its layout and tables; `launch` is a call of it."""

    bias_dtype = torch.float32  # a bias of another type is converted in every call

    def __init__(
        self, native: Any, name: str, problem: Problem, layout: Layout, tables: Tables, **arrays: Any
    ) -> None:
        flat: Int32Array
        flat, sections = tables.flat()
        self.native, self.name, self.layout = native, name, layout
        self.shape, self.splits = problem.shape, layout.splits
        self.dtype = getattr(torch, problem.dtype)
        self.code = DTYPES[problem.dtype]
        self.format = torch.channels_last if problem.channels_last else torch.contiguous_format
        self.kernel = native.Kernel(name, self.code, layout.integers(sections), flat.tolist())
        self.arrays = IndexArrays(tables=flat, **arrays)

    def launch(
        self,
        inp: Tensor,
        weights: Tensor,
        out: Tensor,
        strides: tuple[int, ...] | None = None,
        epilogue: tuple[Tensor | None, Tensor | None, Tensor | None, str] = (None, None, None, "none"),
        channels: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """`channels` is (K, elements of `out` between channels): only the sum of splits needs it."""
        device = inp.device
        if not out.numel():
            return out
        bias, scale, residual, activation = epilogue
        bias, scale = float32(bias), float32(scale)
        # Read in pairs, as `out` is written: a slice may begin between two.
        if residual is not None and (residual.stride() != out.stride() or residual.data_ptr() % 16):
            residual = torch.empty_like(out).copy_(residual)
        finish = (
            *(0 if t is None else t.data_ptr() for t in (scale, bias, residual)),
            ACTIVATIONS[activation],
        )
        split = self.splits > 1
        partial = (
            torch.empty(self.splits * out.numel(), dtype=torch.float32, device=device) if split else None
        )
        with on_device(device):
            stream = current_stream(device)
            self.kernel.run(
                stream, self.arrays.on(device)["tables"].data_ptr(), inp.data_ptr(), inp.stride(),
                weights.data_ptr(), out.data_ptr(), strides or out.stride(),
                0 if partial is None else partial.data_ptr(), out.numel(), *((0, 0, 0, 0) if split else finish),
            )  # fmt: skip
            if partial is not None:
                self.native.reduce(
                    stream,
                    partial.data_ptr(),
                    self.splits,
                    out.data_ptr(),
                    self.code,
                    out.numel(),
                    *channels,
                    *finish,
                )
        return out

    def copy_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """values[rows], zeros where a row is negative: [A, C], rows of C in pieces of 16 bytes."""
        values = values.contiguous()
        if values.data_ptr() % 16:
            values = values.clone()
        out = values.new_empty(len(rows), values.shape[1])
        device = values.device
        if out.numel() == 0:
            return out
        bytes_ = values.shape[1] * values.element_size()
        with on_device(device):
            self.native.copy_rows(
                current_stream(device), values.data_ptr(), rows.data_ptr(), out.data_ptr(), len(rows), bytes_
            )
        return out
