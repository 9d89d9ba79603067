"""stripe_gemm: the vendor's GEMM over all live stripes at once, around a gather.

    fprop  Z[m, a] = sum_c x[m, c] w[a, c]
           y[o, k] = act(scale[k] * sum_{a of filter k} Z[o + t_a, a] + bias[k] + residual)
    dgrad  P[m, a] = dy[m - t_a, k_a]        dx = P W
    wgrad  P as above                        dw = P^T x

m runs over the input pixels of one phase (stripe_kernels/phases.py): at stride s a tap meets 1/s^2 of the
input, and no other product is formed. Every sum has one fixed order, and only readers of a NaN of x see it.
Z and P are kept in x's dtype, so that a float16 product beyond 65504 overflows where a wider sum would not.
The batch is cut into chunks whose Z or P stays in a cache.

The products are torch.mm and torch.bmm: float32 ones follow torch.backends.cuda.matmul.allow_tf32, not
cuDNN's switch. The gather is a Triton kernel on CUDA devices where Triton is there ("gather" of the
registry), and torch's indexing elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stripe_kernels import registry
from stripe_kernels.epilogue import apply_epilogue
from stripe_kernels.geometry import ConvShape
from stripe_kernels.indices import IndexArrays
from stripe_kernels.phases import Phase, phases
from stripe_kernels.registry import Config, Kernel, Pass, Problem, register
from stripe_kernels.roofline import L2, LAUNCH, gpu_seconds, item_size

_CACHE = (
    24 << 20
)  # bytes of Z a chunk should stay under: half the L2 of an H100, which x and y pass through too
_MOST = 2 << 30  # bytes of Z beyond which the whole batch at once is no candidate
# One core, fitted to times on Zen 3: seconds a call, multiply-adds/s of the products, seconds a gathered value.
_CPU_CALL = 2.3e-4
_CPU_MACS = {"fprop": 29e9, "dgrad": 21e9, "wgrad": 18e9}
_CPU_GATHER = {"fprop": 1.5e-9, "dgrad": 2.6e-9, "wgrad": 8.4e-9}


class GemmConfig(NamedTuple):
    images: int  # of a chunk
    fused: int  # 1: the gather the registry names, 0: torch's indexing


class Layout:
    """Where the product of each phase lies in a flat buffer: [n, stripes, pixels] if planar, else [n,
    pixels, stripes]."""

    def __init__(self, problem: Problem, planar: bool) -> None:
        self.shape: ConvShape = problem.shape
        self.phases: tuple[Phase, ...] = phases(problem.skeleton, problem.shape)
        self.planar = planar
        sizes = [phase.stripes * phase.pixels for phase in self.phases]
        self.before = [sum(sizes[:i]) for i in range(len(sizes))]  # values of one image in the phases before
        self.image_values = sum(sizes)

    def product(self, flat: Tensor, images: int, i: int) -> Tensor:
        """Phase i of a buffer of `images` images, contiguous: [images, stripes, pixels] or [images *
        pixels, stripes]."""
        phase = self.phases[i]
        first, size = images * self.before[i], images * phase.stripes * phase.pixels
        shape = (
            (images, phase.stripes, phase.pixels) if self.planar else (images * phase.pixels, phase.stripes)
        )
        return flat[first : first + size].view(shape)

    def image(self, flat: Tensor, images: int, i: int) -> Tensor:
        """The same memory as [images, stripes, rows, columns]."""
        phase, part = self.phases[i], self.product(flat, images, i)
        if self.planar:
            return part.view(images, phase.stripes, phase.rows, phase.columns)
        return part.view(images, phase.rows, phase.columns, phase.stripes).permute(0, 3, 1, 2)


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


class _Gemm:
    """What the passes share: the layout, the packed order of the stripes, and the chunks."""

    def __init__(self, problem: Problem, config: Config, planar: bool) -> None:
        self.config = GemmConfig(*config)
        self.shape = problem.shape
        self.layout = Layout(problem, planar)
        gather = registry.provided("gather") if self.config.fused else TorchGather
        if gather is None:
            raise RuntimeError("stripe_gemm's fused gather needs triton, which is not installed")
        self.gather = gather(self.layout)
        self.format = torch.channels_last if problem.channels_last else torch.contiguous_format
        order = np.concatenate([phase.row for phase in self.layout.phases])
        self.arrays = IndexArrays(row=order.astype(np.int64))  # index_copy_ takes no other type
        ends = np.cumsum([0, *(phase.stripes for phase in self.layout.phases)]).tolist()
        self.stripes_of = [slice(first, last) for first, last in pairwise(ends)]

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/g] -> the same rows, phase by phase
        return weight.detach().index_select(0, self.arrays.on(weight.device)["row"])

    def chunks(self) -> Iterator[slice]:
        for first in range(0, self.shape.N, self.config.images):
            yield slice(first, min(first + self.config.images, self.shape.N))

    def buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(min(self.config.images, self.shape.N) * self.layout.image_values)

    def pixels_of(self, x: Tensor, phase: Phase) -> Tensor:
        """The phase's pixels of x [n, C, H, W]: [n, C/g, rows, columns], a view."""
        s = self.shape
        c0 = phase.group * s.group_c
        return x[:, c0 : c0 + s.group_c, phase.h0 :: s.stride[0], phase.w0 :: s.stride[1]]

    def matrix(self, x: Tensor, phase: Phase) -> Tensor:
        """Those as a matrix: [n, C/g, pixels] if planar, else [n * pixels, C/g]; a view where the memory
        allows."""
        part = self.pixels_of(x, phase)
        return (
            part.flatten(2)
            if self.layout.planar
            else part.permute(0, 2, 3, 1).reshape(-1, self.shape.group_c)
        )


class GemmFprop(_Gemm):
    def __init__(self, problem: Problem, config: Config) -> None:
        super().__init__(problem, config, planar=not problem.channels_last)

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
        z = self.buffer(x)
        for chunk in self.chunks():
            n = chunk.stop - chunk.start
            for i, phase in enumerate(self.layout.phases):
                if not phase.stripes:
                    continue
                product, weight = self.layout.product(z, n, i), packed[self.stripes_of[i]]
                matrix = self.matrix(x[chunk], phase)
                if self.layout.planar:
                    torch.bmm(weight.expand(n, *weight.shape), matrix, out=product)
                else:
                    torch.mm(matrix, weight.t(), out=product)
            self.gather.sum(z, y[chunk], bias, scale, None if residual is None else residual[chunk], act)
        return y


class GemmDgrad(_Gemm):
    def __init__(self, problem: Problem, config: Config) -> None:
        super().__init__(problem, config, planar=not problem.channels_last)
        self.whole = len(self.layout.phases) == 1  # then dx is the product, otherwise it is put together

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        dx = torch.empty(self.shape.input_size, dtype=dy.dtype, device=dy.device, memory_format=self.format)
        p, planar = self.buffer(dy), self.layout.planar
        for chunk in self.chunks():
            n = chunk.stop - chunk.start
            for i, phase in enumerate(self.layout.phases):
                target = self.pixels_of(dx[chunk], phase)
                if not phase.stripes:
                    target.zero_()
                    continue
                self.gather.spread(dy[chunk], i, p)
                product, weight = self.layout.product(p, n, i), packed[self.stripes_of[i]]
                left, right = (weight.t().expand(n, -1, -1), product) if planar else (product, weight)
                if self.whole:
                    torch.matmul(left, right, out=self.matrix(dx[chunk], phase))
                    continue
                found = torch.matmul(left, right)
                image = (n, phase.rows, phase.columns, self.shape.group_c)
                target.copy_(found.view(target.shape) if planar else found.view(image).permute(0, 3, 1, 2))
        return dx


class GemmWgrad(_Gemm):
    """Pixel-major in every memory format, so that one product sums over the whole chunk."""

    def __init__(self, problem: Problem, config: Config) -> None:
        super().__init__(problem, config, planar=False)

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(self.arrays.on(x.device)["row"].shape[0], self.shape.group_c, dtype=wide)
        p = self.buffer(dy)
        for chunk in self.chunks():
            for i, phase in enumerate(self.layout.phases):
                if phase.stripes:
                    self.gather.spread(dy[chunk], i, p)
                    product = self.layout.product(p, chunk.stop - chunk.start, i)
                    total[self.stripes_of[i]] += torch.mm(product.t(), self.matrix(x[chunk], phase))
        dw = x.new_empty(total.shape)
        return dw.index_copy_(0, self.arrays.on(x.device)["row"], total.to(x.dtype))


_RUNNERS = {"fprop": GemmFprop, "dgrad": GemmDgrad, "wgrad": GemmWgrad}


def _predict(problem: Problem, which: Pass, config: GemmConfig, image_values: int) -> float:
    """The products, then the gather: Z or P is written and read once, in L2 where a chunk fits."""
    s, size = problem.shape, item_size(problem.dtype)
    values = image_values * s.N
    macs = values * s.group_c
    if problem.device != "cuda":
        return _CPU_CALL + (macs / _CPU_MACS[which] + values * _CPU_GATHER[which]) / problem.threads
    inside = config.images * image_values * size <= _CACHE
    spill = 0.0 if inside else 2.0 * values * size
    moved = s.N * (s.C * s.H * s.W + s.K * s.P * s.Q) * size
    chunks = -(-s.N // config.images)
    product = gpu_seconds(problem.dtype, macs=macs, moved=moved / 2 + spill / 2, share=0.9, launches=chunks)
    return product + chunks * LAUNCH + max(values * size / L2, (moved / 2 + spill / 2) / 3e12)


def _chunks(problem: Problem, which: Pass, image_values: int) -> list[int]:
    """Images a chunk: what fits the cache, and the whole batch. On the CPU wgrad takes images one by one,
    as torch's does: MKL adds a whole batch in one sequence, which lost up to 12 units in the last place
    over 350 pixels."""
    images = max(1, problem.shape.N)
    if which == "wgrad" and problem.device == "cpu":
        return [1]
    bytes_of_image = max(1, image_values * item_size(problem.dtype))
    cached = max(1, min(images, _CACHE // bytes_of_image))
    return [cached] if images == cached or images * bytes_of_image > _MOST else [cached, images]


def _candidates(problem: Problem, which: Pass) -> dict[Config, float]:
    image_values = Layout(problem, planar=False).image_values
    fused = int(problem.device == "cuda" and registry.provided("gather") is not None)
    configs = [GemmConfig(images, fused) for images in _chunks(problem, which, image_values)]
    return {tuple(config): _predict(problem, which, config, image_values) for config in configs}


def _build(problem: Problem, which: Pass, config: Config) -> Any:
    return _RUNNERS[which](problem, config)


register(Kernel("stripe_gemm", lambda problem, which: None, _candidates, _build))
