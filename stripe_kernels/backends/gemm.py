"""stripe_gemm: the vendor's GEMM over all live stripes at once, around a gather.

    fprop  Z[m, a] = sum_c x[m, c] w[a, c]
           y[o, k] = act(scale[k] * sum_{a of filter k} Z[o + t_a, a] + bias[k] + residual)
    dgrad  P[m, a] = dy[m - t_a, k_a]        dx = P W
    wgrad  P as above                        dw = P^T x

m runs over the input pixels of one phase (stripe_kernels/phases.py): at stride s a tap meets 1/s^2 of the
input, and no other product is formed. Every sum has one fixed order, and only readers of a NaN of x see it.
Z and P are kept in x's dtype, so that a float16 product beyond 65504 overflows where a wider sum would not.
The batch is cut into chunks whose Z or P stays in a cache. On a GPU Z lies stripe by stripe, so that a warp of
the sum reads neighbouring pixels and a filter of few stripes ends early; P has its columns aligned.

The products are torch.mm and torch.bmm: float32 ones follow torch.backends.cuda.matmul.allow_tf32, not
cuDNN's switch. The gather is torch's indexing, or on a GPU one that the registry names: Triton's ("gather") or that
of CUDA C++ ("native gather").
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stripe_kernels import registry
from stripe_kernels.epilogue import apply_epilogue
from stripe_kernels.geometry import ConvShape
from stripe_kernels.indices import IndexArrays
from stripe_kernels.phases import Phase, PhaseTap, phases
from stripe_kernels.registry import Config, Kernel, Pass, Problem, register
from stripe_kernels.roofline import gpu_seconds, item_size, math_type

_CACHE = (
    24 << 20
)  # bytes of Z a chunk should stay under: half the L2 of an H100, which x and y pass through too
_MOST = 2 << 30  # bytes of Z beyond which the whole batch at once is no candidate
# One core, fitted to times on Zen 3: seconds a call, multiply-adds/s of the products, seconds a gathered value.
_CPU_CALL = 2.3e-4
_CPU_MACS = {"fprop": 29e9, "dgrad": 21e9, "wgrad": 18e9}
_CPU_GATHER = {"fprop": 1.5e-9, "dgrad": 2.6e-9, "wgrad": 8.4e-9}
_CPU_SUM = 1e-9  # seconds a value of dw that an image is added to
_CPU_OUT = 1e-9  # seconds a value of y or dx
_CPU_TURN = 2e-9  # the same, beyond that, where it goes out in channels_last
# Instructions of a value in the gathers, over those that roofline.py counts; and how much longer Triton's take than
# bytes and instructions say (an H200: 1.0 to 1.8 times, the native ones .9 to 1.4).
_GATHERED, _TRITONS = 1.4, 1.3


Kind = Literal["image", "pixel", "stripe"]
Row = tuple[int, int, int, int, int]  # of Z: its number, the tap's shift (i, j), rows and columns of its map
_GATHERS = {1: "gather", 2: "native gather"}  # parts of the registry
_NARROW, _STRETCH = 16, 32  # rows or columns of a product, and products between its partial sums
_PITCH = 8  # 16 bytes of the narrowest type


class GemmConfig(NamedTuple):
    images: int  # of a chunk
    fused: int  # the gather: 0 torch's indexing, 1 "gather" of the registry, 2 its "native gather"


class Layout:
    """Where the products of the phases lie in one flat buffer, in one of three kinds:

    "image"   [n, columns, pixels] a phase: what contiguous maps give torch.bmm
    "pixel"   [n * pixels, columns] a phase
    "stripe"  [columns of every phase, pitch]: a row of n * pixels values, so that neighbours in memory are pixels
              in every memory format, and a stripe of a dead filter costs its reader nothing

    A column is a stripe. With `align` each tap's columns are filled up to a multiple of it by columns without a
    stripe, which are zeros: a GPU reads and writes 16 bytes at a time, and its GEMM is slow on odd widths.
    """

    def __init__(self, problem: Problem, kind: Kind, align: int = 1) -> None:
        self.shape: ConvShape = problem.shape
        self.phases: tuple[Phase, ...] = phases(problem.skeleton, problem.shape)
        self.kind, self.align = kind, align
        self.columns: list[int] = []  # of each phase
        self.taps: list[
            list[tuple[PhaseTap, int, int]]
        ] = []  # of each phase: tap, first column, column after the last
        rows: list[np.ndarray] = []
        for phase in self.phases:
            mine, first = [], 0
            for tap in phase.taps:
                width = -(-len(tap.row) // align) * align
                rows.append(
                    np.pad(tap.row, (0, width - len(tap.row)), constant_values=problem.skeleton.stripes)
                )
                mine.append((tap, first, first + width))
                first += width
            self.taps.append(mine)
            self.columns.append(first)
        # [columns of every phase]: row of the packed weight, A where there is no stripe.
        self.row = np.concatenate([np.empty(0, np.int64), *rows]).astype(np.int64)
        self.padded = bool((self.row == problem.skeleton.stripes).any())
        ends = np.cumsum([0, *self.columns]).tolist()
        self.column_ranges = [slice(first, last) for first, last in pairwise(ends)]
        sizes = [c * phase.pixels for c, phase in zip(self.columns, self.phases, strict=True)]
        self.before = [sum(sizes[:i]) for i in range(len(sizes))]  # values of one image in the phases before
        self.image_values = sum(sizes)

    def pitch(self, images: int) -> int:
        """Values from column to column of the kind "stripe": a multiple of 16 bytes."""
        return -(-images * max(phase.pixels for phase in self.phases) // _PITCH) * _PITCH

    def values(self, images: int) -> int:
        """Of the whole buffer."""
        if self.kind == "stripe":
            return len(self.row) * self.pitch(images)
        return images * self.image_values

    def matrix(self, flat: Tensor, images: int, i: int) -> Tensor:
        """Phase i: [images * pixels, columns] of "pixel", [columns, images * pixels] of "stripe"."""
        phase, columns = self.phases[i], self.columns[i]
        if self.kind == "stripe":
            pitch = self.pitch(images)
            mine = flat[self.column_ranges[i].start * pitch :][: columns * pitch].view(columns, pitch)
            return mine[:, : images * phase.pixels]
        first, size = images * self.before[i], images * columns * phase.pixels
        return flat[first : first + size].view(images * phase.pixels, columns)

    def batched(self, flat: Tensor, images: int, i: int) -> Tensor:
        """Phase i of "image" or "stripe": [images, columns, pixels]."""
        phase, columns = self.phases[i], self.columns[i]
        if self.kind == "stripe":
            return self.matrix(flat, images, i).view(columns, images, phase.pixels).permute(1, 0, 2)
        first, size = images * self.before[i], images * columns * phase.pixels
        return flat[first : first + size].view(images, columns, phase.pixels)

    def image(self, flat: Tensor, images: int, i: int) -> Tensor:
        """Phase i: [images, columns, rows, columns of pixels]."""
        phase = self.phases[i]
        if self.kind == "pixel":
            part = self.matrix(flat, images, i)
            return part.view(images, phase.rows, phase.columns, self.columns[i]).permute(0, 3, 1, 2)
        return self.batched(flat, images, i).view(images, self.columns[i], phase.rows, phase.columns)

    def rows_by_filter(self) -> list[list[Row]]:
        """For every filter the rows of the kind "stripe" that hold its stripes' products."""
        rows: list[list[Row]] = [[] for _ in range(self.shape.K)]
        for phase, taps, columns in zip(self.phases, self.taps, self.column_ranges, strict=True):
            for tap, first, _ in taps:
                for number, filter_ in enumerate(tap.filters.tolist()):
                    row = columns.start + first + number, tap.i, tap.j, phase.rows, phase.columns
                    rows[phase.group * self.shape.group_k + filter_].append(row)
        return rows


class TorchGather:
    """The gather in torch's indexing, tap by tap: any device and dtype."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        k0 = [phase.group * layout.shape.group_k for phase in layout.phases]
        filters = [tap.filters + k for k, phase in zip(k0, layout.phases, strict=True) for tap in phase.taps]
        self.arrays = IndexArrays(**{str(i): f for i, f in enumerate(filters)})
        self.taps = [(i, tap) for i, phase in enumerate(layout.phases) for tap in phase.taps]

    def _overlaps(self) -> Iterator[tuple[int, Any, str, tuple[slice, slice], tuple[slice, slice]]]:
        """For every tap its phase, name, and the pixels of the output and of the phase that meet."""
        s = self.layout.shape
        for name, (i, tap) in enumerate(self.taps):
            phase = self.layout.phases[i]
            p = slice(max(0, -tap.i), max(0, min(s.P, phase.rows - tap.i)))
            q = slice(max(0, -tap.j), max(0, min(s.Q, phase.columns - tap.j)))
            if p.start < p.stop and q.start < q.stop:
                at = slice(p.start + tap.i, p.stop + tap.i), slice(q.start + tap.j, q.stop + tap.j)
                yield i, tap, str(name), (p, q), at

    def sum(
        self,
        z: Tensor,  # flat
        y: Tensor,  # [n, K, P, Q], written
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> None:
        arrays = self.arrays.on(y.device)
        wide = torch.promote_types(y.dtype, torch.float32)
        acc = y.new_zeros(y.shape, dtype=wide)
        for i, tap, name, (p, q), (rows, columns) in self._overlaps():
            part = self.layout.image(z, len(y), i)[:, tap.first : tap.last, rows, columns]
            acc[:, :, p, q].index_add_(1, arrays[name], part.to(wide))
        y.copy_(apply_epilogue(acc, bias, scale, residual, activation))

    def spread(self, dy: Tensor, i: int, out: Tensor) -> None:
        """P of phase i for the images of dy [n, K, P, Q], into a flat buffer."""
        arrays = self.arrays.on(dy.device)
        image = self.layout.image(out, len(dy), i).zero_()
        for of, tap, name, (p, q), (rows, columns) in self._overlaps():
            if of == i:
                image[:, tap.first : tap.last, rows, columns] = dy[:, :, p, q].index_select(1, arrays[name])


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right [..., M, N]. Where either is narrow MKL adds in a single sequence: with one row 3.3 times as far
    off as a square product over 2304 products, with two rows 2.8 times as far as torch's dgrad over 300. There the
    sum is torch's pairwise one, or one of stretches."""
    narrow = min(left.shape[-2], right.shape[-1])
    if narrow > _NARROW or left.dtype not in (torch.float32, torch.float64) or left.device.type != "cpu":
        return torch.matmul(left, right, out=out) if out is not None else torch.matmul(left, right)
    if left.shape[-2] == 1:
        found = (left.mT * right).sum(-2, keepdim=True)
    elif right.shape[-1] == 1:
        found = (left * right.mT).sum(-1, keepdim=True)
    else:
        parts = zip(left.split(_STRETCH, -1), right.split(_STRETCH, -2), strict=True)
        found = sum((torch.matmul(a, b) for a, b in parts), left.new_zeros(()))
    return found if out is None else out.copy_(found)


class _Gemm:
    """What the passes share: the layout, the packed order of the stripes, and the chunks."""

    def __init__(self, problem: Problem, config: Config, plain: Kind, fused: Kind) -> None:
        """The layout's kind without and with the fused gather."""
        self.config = GemmConfig(*config)
        self.shape = problem.shape
        kind = fused if self.config.fused else plain
        aligned = self.config.fused and kind == "pixel"
        self.layout = Layout(problem, kind, 16 // item_size(problem.dtype) if aligned else 1)
        gather = registry.provided(_GATHERS[self.config.fused]) if self.config.fused else TorchGather
        if gather is None:
            raise RuntimeError(f"stripe_gemm's {_GATHERS[self.config.fused]} is not installed")
        self.gather = gather(self.layout)
        self.format = torch.channels_last if problem.channels_last else torch.contiguous_format
        self.last = problem.channels_last
        column = np.empty(problem.skeleton.stripes, np.int64)
        real = np.flatnonzero(self.layout.row < problem.skeleton.stripes)
        column[self.layout.row[real]] = real
        self.arrays = IndexArrays(row=self.layout.row, column=column)

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/g] -> [columns, C/g], phase by phase
        weight = weight.detach()
        if self.layout.padded:
            weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        return weight.index_select(0, self.arrays.on(weight.device)["row"])

    def chunks(self) -> Iterator[slice]:
        for first in range(0, self.shape.N, self.config.images):
            yield slice(first, min(first + self.config.images, self.shape.N))

    def buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(self.layout.values(min(self.config.images, self.shape.N)))

    def pixels_of(self, x: Tensor, phase: Phase) -> Tensor:
        """The phase's pixels of x [n, C, H, W]: [n, C/g, rows, columns], a view."""
        s = self.shape
        c0 = phase.group * s.group_c
        return x[:, c0 : c0 + s.group_c, phase.h0 :: s.stride[0], phase.w0 :: s.stride[1]]

    def pixel_major(self, x: Tensor, phase: Phase) -> Tensor:
        """Those as [n * pixels, C/g], a view where the memory allows."""
        return self.pixels_of(x, phase).permute(0, 2, 3, 1).reshape(-1, self.shape.group_c)

    def channel_major(self, x: Tensor, phase: Phase) -> Tensor:
        """Those as [n, C/g, pixels], a view where the memory allows."""
        return self.pixels_of(x, phase).flatten(2)


class GemmFprop(_Gemm):
    def __init__(self, problem: Problem, config: Config) -> None:
        super().__init__(problem, config, "pixel" if problem.channels_last else "image", "stripe")
        self.bias_dtype = getattr(self.gather, "bias_dtype", None)  # as its gather reads one

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        y = torch.empty(self.shape.output_size, dtype=x.dtype, device=x.device, memory_format=self.format)
        z, layout = self.buffer(x), self.layout
        for chunk in self.chunks():
            n = chunk.stop - chunk.start
            for i, phase in enumerate(layout.phases):
                if not phase.stripes:
                    continue
                weight = packed[layout.column_ranges[i]]
                if not self.last:
                    matrix = self.channel_major(x[chunk], phase)
                    _product(weight.expand(n, *weight.shape), matrix, out=layout.batched(z, n, i))
                elif layout.kind == "pixel":
                    _product(self.pixel_major(x[chunk], phase), weight.t(), out=layout.matrix(z, n, i))
                else:
                    _product(weight, self.pixel_major(x[chunk], phase).t(), out=layout.matrix(z, n, i))
            self.gather.sum(z, y[chunk], bias, scale, None if residual is None else residual[chunk], act)
        return y


class GemmDgrad(_Gemm):
    def __init__(self, problem: Problem, config: Config) -> None:
        last = problem.channels_last
        super().__init__(problem, config, "pixel" if last else "image", "pixel" if last else "stripe")
        self.whole = len(self.layout.phases) == 1  # then dx is the product, otherwise it is put together

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        dx = torch.empty(self.shape.input_size, dtype=dy.dtype, device=dy.device, memory_format=self.format)
        p, layout = self.buffer(dy), self.layout
        for chunk in self.chunks():
            n = chunk.stop - chunk.start
            for i, phase in enumerate(layout.phases):
                target = self.pixels_of(dx[chunk], phase)
                if not phase.stripes:
                    target.zero_()
                    continue
                self.gather.spread(dy[chunk], i, p)
                weight = packed[layout.column_ranges[i]]
                if self.last:
                    left, right = layout.matrix(p, n, i), weight
                    whole = self.pixel_major(dx[chunk], phase) if self.whole else None
                else:
                    left, right = weight.t().expand(n, -1, -1), layout.batched(p, n, i)
                    whole = self.channel_major(dx[chunk], phase) if self.whole else None
                if whole is not None:
                    _product(left, right, out=whole)
                    continue
                found, image = _product(left, right), (n, phase.rows, phase.columns, self.shape.group_c)
                target.copy_(found.view(image).permute(0, 3, 1, 2) if self.last else found.view(target.shape))
        return dx


class GemmWgrad(_Gemm):
    """Pixel-major in every memory format, so that one product sums over the whole chunk; in strict float32 on a GPU
    over one image, and those are added: one sequence over a batch was 1.9 times the budget off on an H100."""

    def __init__(self, problem: Problem, config: Config) -> None:
        super().__init__(problem, config, "pixel", "pixel")
        self.one = 0 < self.shape.N <= self.config.images
        partial = self.config.images * len(self.layout.row) * self.shape.group_c * 4
        strict = problem.dtype == "float32" and problem.device == "cuda" and not problem.tf32[1]
        self.by_image = strict and partial <= _MOST

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        size = len(self.layout.row), self.shape.group_c
        # Of one chunk, or the sums of several.
        total = x.new_empty(size) if self.one else x.new_zeros(size, dtype=wide)
        p = self.buffer(dy)
        for chunk in self.chunks():
            n = chunk.stop - chunk.start
            for i, phase in enumerate(self.layout.phases):
                if phase.stripes:
                    self.gather.spread(dy[chunk], i, p)
                    left, right = self.layout.matrix(p, n, i), self.pixel_major(x[chunk], phase)
                    mine = total[self.layout.column_ranges[i]]
                    if self.by_image:
                        parts = torch.bmm(left.unflatten(0, (n, -1)).mT, right.unflatten(0, (n, -1)))
                        found = parts.sum(0)
                    elif self.one:
                        _product(left.t(), right, out=mine)
                        continue
                    else:
                        found = _product(left.t(), right)
                    mine.copy_(found) if self.one else mine.add_(found)
        return total.index_select(0, self.arrays.on(x.device)["column"]).to(x.dtype)


_RUNNERS = {"fprop": GemmFprop, "dgrad": GemmDgrad, "wgrad": GemmWgrad}


def _predict(problem: Problem, which: Pass, config: GemmConfig, image_values: int) -> float:
    """The products, then the gather: Z or P is written and read once, in L2 where a chunk fits."""
    s, size = problem.shape, item_size(problem.dtype)
    values = image_values * s.N
    macs = values * s.group_c
    if problem.device != "cuda":
        out = {"fprop": s.K * s.P * s.Q, "dgrad": s.C * s.H * s.W, "wgrad": 0}[which] * s.N
        turn = (_CPU_OUT + (_CPU_TURN if problem.channels_last else 0.0)) * out
        # wgrad takes image by image (_chunks), and adds all of dw every time.
        calls, sums = (s.N, s.N * problem.skeleton.stripes * s.group_c) if which == "wgrad" else (1, 0)
        seconds = macs / _CPU_MACS[which] + values * _CPU_GATHER[which] + turn + sums * _CPU_SUM
        return _CPU_CALL * calls + seconds / problem.threads
    inside = config.images * image_values * size <= _CACHE
    spill = 0.0 if inside else 2.0 * values * size
    moved = s.N * (s.C * s.H * s.W + s.K * s.P * s.Q) * size
    chunks = -(-s.N // config.images)
    launches = chunks * len(phases(problem.skeleton, s))
    math = math_type(problem.dtype, problem.tf32[1])
    product = gpu_seconds(math, macs=macs, moved=moved / 2 + spill / 2, share=0.9, launches=launches)
    slower = _TRITONS if config.fused == 1 else 1.0
    return product + slower * gpu_seconds(
        math,
        macs=0.0,
        moved=moved / 2 + spill / 2,
        loaded=2.0 * values * size,
        gathered=_GATHERED * (_walked(problem) * s.N * s.P * s.Q if which == "fprop" else values),
        launches=chunks if which == "fprop" else launches,
    )


def _walked(problem: Problem) -> int:
    """Values a pixel that the fused sum walks over: of every 16 filters as many as the one of most stripes has."""
    per_filter = problem.skeleton.live.reshape(problem.shape.K, -1).sum(1)
    return 16 * sum(int(block.max()) for block in np.split(per_filter, range(16, problem.shape.K, 16)))


def _chunks(problem: Problem, which: Pass, image_values: int) -> list[int]:
    """Images a chunk: what fits the cache, and the whole batch. On the CPU wgrad takes images one by one,
    as torch's does: MKL adds a whole batch in one sequence, which lost up to 12 units in the last place
    over 350 pixels."""
    images = max(1, problem.shape.N)
    if which == "wgrad" and problem.device == "cpu":
        return [1]
    bytes_of_image = max(1, image_values * item_size(problem.dtype))
    cached = max(1, min(images, _CACHE // bytes_of_image))
    cached = -(-images // -(-images // cached))  # as many chunks, of like size
    return [cached] if images == cached or images * bytes_of_image > _MOST else [cached, images]


def _gathers(problem: Problem, which: Pass) -> list[int]:
    if problem.device != "cuda":
        return [0]
    fits = registry.provided("native gather's refusal")
    found = [1] if registry.provided("gather") is not None else []
    return found + ([2] if fits is not None and fits(problem, which) is None else []) or [0]


def _candidates(problem: Problem, which: Pass) -> dict[Config, float]:
    image_values = Layout(problem, "pixel").image_values
    configs = [
        GemmConfig(images, fused)
        for images in _chunks(problem, which, image_values)
        for fused in _gathers(problem, which)
    ]
    return {tuple(config): _predict(problem, which, config, image_values) for config in configs}


def _build(problem: Problem, which: Pass, config: Config) -> Any:
    return _RUNNERS[which](problem, config)


register(Kernel("stripe_gemm", lambda problem, which: None, _candidates, _build))
