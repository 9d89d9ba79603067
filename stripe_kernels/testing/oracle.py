"""The three results by torch's own convolution; in float64 the oracle, and in longdouble that of float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stripe_kernels.reference import masked_conv2d, scatter_stripes
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.testing.cases import Case, Operands


class Results(NamedTuple):
    y: Tensor  # [N, K, P, Q]
    dx: Tensor  # [N, C, H, W]
    dw: Tensor  # [A, C/groups]


def evaluate(
    problem: Case,
    operands: Operands,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    only: Pass | None = None,
) -> Results:
    """The three results by torch's own convolution in `dtype` and a memory format: in float64 the oracle.

    `only` leaves the results of other passes empty.
    """
    s = problem.shape
    live = torch.from_numpy(problem.skeleton.live.copy()).to(operands.x.device)
    top, left, bottom, right = s.padding
    with torch.enable_grad():
        x = operands.x.detach().to(dtype, memory_format=memory_format, copy=True)
        weight = operands.weight.detach().to(dtype, copy=True)
        x.requires_grad_(only in (None, "dgrad")), weight.requires_grad_(only in (None, "wgrad"))
        even = (top, left) == (bottom, right)
        padded = x if even else F.pad(x, (left, right, top, bottom))
        padding = (top, left) if even else (0, 0)
        dense = scatter_stripes(weight, live)
        stride, dilation = s.stride, s.dilation
        if s.taps == 1 and stride != (1, 1):  # torch's wgrad can corrupt the heap there: see SECURITY.md
            padded = F.pad(padded, (padding[1], padding[1], padding[0], padding[0]))
            padded, stride, padding = padded[:, :, :: stride[0], :: stride[1]], (1, 1), (0, 0)
            padded = padded.contiguous(memory_format=memory_format)
        padded, dense = (t.contiguous(memory_format=memory_format) for t in (padded, dense))
        y = masked_conv2d(padded, dense, live, None, stride, padding, dilation, s.groups)
        dy = operands.dy.to(dtype, memory_format=memory_format)
        wanted = [t for t in (x, weight) if t.requires_grad]
        found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy), strict=True)) if wanted else {}
    dx, dw = (found.get(id(t), t.new_empty(0)) for t in (x, weight))
    return asked(Results(y.detach(), dx, dw), only)


def asked(results: Results, only: Pass | None) -> Results:
    return Results(
        *(t if only in (None, p) else t.new_empty(0) for p, t in zip(PASSES, results, strict=True))
    )


def evaluate_wider(problem: Case, operands: Operands) -> Results:
    """The three results in numpy's longdouble, tap by tap, then rounded: the oracle of float64 itself."""
    s, stripes = problem.shape, np.argwhere(problem.skeleton.live)
    x, weight, dy = (t.detach().cpu().double().numpy().astype(np.longdouble) for t in operands[:3])
    top, left, bottom, right = s.padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    y, dw, dx = np.zeros(s.output_size, np.longdouble), np.zeros_like(weight), np.zeros_like(padded)
    for group, r, t in np.ndindex(s.groups, s.R, s.S):
        of_tap = (stripes[:, 0] // s.group_k == group) & (stripes[:, 1] == r) & (stripes[:, 2] == t)
        k, channels = stripes[of_tap, 0], slice(group * s.group_c, (group + 1) * s.group_c)
        rows, columns = (
            slice(tap * dilation, tap * dilation + (out - 1) * stride + 1, stride)
            for tap, dilation, out, stride in zip((r, t), s.dilation, (s.P, s.Q), s.stride, strict=True)
        )
        read = padded[:, channels, rows, columns]
        y[:, k] += np.einsum("ncpq,kc->nkpq", read, weight[of_tap])
        dw[of_tap] = np.einsum("nkpq,ncpq->kc", dy[:, k], read)
        dx[:, channels, rows, columns] += np.einsum("nkpq,kc->ncpq", dy[:, k], weight[of_tap])
    inside = dx[:, :, top : top + s.H, left : left + s.W]
    return Results(*(torch.from_numpy(v.astype(np.float64)).to(operands.x.device) for v in (y, inside, dw)))
