"""What tests and benchmarks share: named lopsided problems, operands in every layout, the error budget.

    case = CASES["lopsided"]
    operands = case.operands(torch.bfloat16, layout="channels_last")
    budget = budgets(case, operands)                   # float64 oracle, torch's own error in the same dtype
    budget.y.check(y), budget.dx.check(dx), budget.dw.check(dw)

The budget of a result: its largest error is at most twice the largest torch makes in the same dtype, plus two
units in the last place of the largest expected value; its root mean square error likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels.geometry import ConvShape
from stripe_kernels.plan import GPU_MARGIN as GPU_MARGIN
from stripe_kernels.reference import masked_conv2d, scatter_stripes
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.skeleton import FilterSkeleton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that every kernel takes; a few take float64 too
PATTERNS = ("random", "full", "empty", "one stripe", "one tap", "dead filters", "borders")


def live_stripes(pattern: str, size: tuple[int, int, int], density: float, seed: int) -> FilterSkeleton:
    """Which stripes of [K, R, S] live; `density` has a say in the random patterns."""
    generator = np.random.default_rng(seed)
    k, r, s = np.indices(size)
    tap, taps = r * size[2] + s, size[1] * size[2]
    random = generator.random(size) < density
    live = {
        "random": random,
        "full": k >= 0,
        "empty": k < 0,
        "one stripe": k * taps + tap == generator.integers(math.prod(size)),
        "one tap": tap == generator.integers(taps),
        "dead filters": random & (k % 3 == 1),
        "borders": random & ((r != size[1] // 2) | (s != size[2] // 2)),
    }
    return FilterSkeleton(live[pattern])


class Operands(NamedTuple):
    """Tensors of one case: what the three passes read."""

    x: Tensor  # [N, C, H, W]
    weight: Tensor  # [A, C/groups]
    dy: Tensor  # [N, K, P, Q]
    bias: Tensor  # [K]
    scale: Tensor  # [K]
    residual: Tensor  # [N, K, P, Q]


@dataclass(frozen=True)
class Case:
    """One convolution and its skeleton, reproducible from this line alone."""

    name: str
    shape: ConvShape
    density: float = 0.4
    pattern: str = "random"
    seed: int = 0

    @property
    def skeleton(self) -> FilterSkeleton:
        size = (self.shape.K, self.shape.R, self.shape.S)
        return live_stripes(self.pattern, size, self.density, self.seed)

    @property
    def arguments(self) -> tuple[str, tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
        """What StripeOp and the operators take before the kernel's name."""
        s = self.shape
        return self.skeleton.text, s.stride, s.padding, s.dilation, s.groups

    def operands(
        self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = "cpu"
    ) -> Operands:
        """Normal values of variance 1, the weight's such that y has it too; maps lie in `layout`."""
        s = self.shape
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

        stripes = self.skeleton.stripes
        fan_in = max(1.0, stripes / s.K) * s.group_c
        weight = normal(stripes, s.group_c) / math.sqrt(fan_in)
        x, dy, residual = (normal(*size) for size in (s.input_size, s.output_size, s.output_size))
        lay = LAYOUTS[layout]
        return Operands(lay(x), weight, lay(dy), normal(s.K), normal(s.K), lay(residual))

    def batch(self, images: int) -> Case:
        """The same case with another N."""
        return replace(self, shape=replace(self.shape, N=images))


def case(
    name: str,
    *,
    N: int = 3,
    C: int = 8,
    H: int = 7,
    W: int = 7,
    K: int = 8,
    R: int = 3,
    S: int = 3,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    density: float = 0.4,
    pattern: str = "random",
    seed: int = 0,
) -> Case:
    """A case from its sizes. `padding` is (height, width) or (top, left, bottom, right)."""
    top, left, bottom, right = (*padding, *padding)[:4]
    shape = ConvShape(N, C, H, W, K, R, S, stride, (top, left, bottom, right), dilation, groups)
    return Case(name, shape, density, pattern, seed)


CASES: dict[str, Case] = {
    c.name: c
    for c in (
        case("lopsided", N=3, C=5, H=9, W=7, K=11, R=3, S=2, stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
        case("grouped", N=5, C=6, H=7, W=10, K=14, padding=(1, 1), groups=2),
        case("grouped lopsided", N=2, C=10, H=11, W=6, K=6, R=2, stride=(1, 2), padding=(0, 2), groups=2),
        case("depthwise", N=2, C=7, H=9, W=8, K=14, groups=7),
        case("no image", N=0, C=5, H=6, W=5, K=7),
        case("one image", N=1, C=19, H=13, W=11, K=23, density=0.3),
        case("batch of a prime", N=19, C=17, H=5, W=3, K=13),
        case("batch of vectors", N=33, C=8, H=2, W=2, K=19),
        case("tiny map", N=5, C=33, H=1, W=2, K=9),
        case("pointwise", N=2, C=17, H=5, W=3, K=9, R=1, S=1, padding=(0, 0), density=0.6),
        case("pointwise strided", N=3, C=9, H=8, W=7, K=9, R=1, S=1, stride=(2, 3), padding=(0, 0)),
        case("strided", N=7, C=4, H=8, W=5, K=10, stride=(2, 2)),
        case("stride beyond the filter", N=2, C=3, H=11, W=13, K=5, R=2, S=2, stride=(3, 4), padding=(0, 1)),
        case("wide padding", N=2, C=3, H=4, W=3, K=6, R=2, stride=(3, 1), padding=(3, 4), dilation=(1, 2)),
        case("padding wider than the map", N=2, C=3, H=2, W=1, K=5, R=5, S=4, padding=(4, 5), density=0.5),
        case("uneven padding", N=2, C=6, H=6, W=9, K=7, R=4, S=2, padding=(1, 0, 2, 1)),
        case("uneven dilated", N=3, C=5, H=8, W=7, K=6, R=2, S=4, padding=(1, 4, 2, 5), dilation=(3, 3)),
        case("row filter", N=3, C=6, H=4, W=17, K=9, R=1, S=7, padding=(0, 3)),
        case("column filter", N=3, C=6, H=17, W=4, K=9, R=5, S=1, padding=(2, 0), stride=(2, 1)),
        case("filter as large as the map", N=4, C=6, H=5, W=4, K=9, R=5, S=4, padding=(0, 0)),
        case("dilated", N=2, C=7, H=12, W=9, K=8, padding=(2, 3), dilation=(2, 3)),
        case("rows never read", N=2, C=3, H=10, W=10, K=4, R=2, S=2, stride=(4, 4), padding=(0, 0)),
        case("one channel", N=3, C=1, H=9, W=9, K=17),
        case("one filter", N=3, C=9, H=9, W=6, K=1, density=0.7),
        case("wide row", N=1, C=3, H=3, W=211, K=5),
        case("many channels", N=2, C=130, H=4, W=5, K=67, density=0.15),
        case("full", N=2, C=8, H=6, W=7, K=9, pattern="full"),
        case("empty", N=2, C=8, H=6, W=7, K=9, pattern="empty"),
        case("empty, no image", N=0, C=8, H=6, W=7, K=9, pattern="empty"),
        case("one stripe", N=3, C=8, H=6, W=7, K=9, pattern="one stripe"),
        case("one tap", N=3, C=8, H=6, W=7, K=9, pattern="one tap"),
        case("one tap strided", N=3, C=8, H=6, W=7, K=9, pattern="one tap", stride=(2, 3), seed=3),
        case("dead filters", N=3, C=8, H=6, W=7, K=10, pattern="dead filters", density=0.7),
        case("borders only", N=17, C=8, H=3, W=3, K=10, pattern="borders", density=0.5),
    )
}  # fmt: skip


def _into(storage: Tensor, t: Tensor) -> Tensor:
    """t's values in the memory of `storage`, a view of t's shape."""
    return storage.copy_(t)


# The same values in the memory layouts a caller may bring; "expanded" repeats the first channel instead.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: _into(
        t.new_full((t.shape[0] + 1, t.shape[1] * 2 + 1, t.shape[2] + 3, t.shape[3] * 2 + 2), math.nan)[
            1:, 1::2, 2:-1, 1:-1:2
        ], t
    ),
    "channels_last sliced": lambda t: _into(
        t.new_full((t.shape[0], t.shape[2] + 1, t.shape[3] + 2, t.shape[1] + 3), math.nan)
        .permute(0, 3, 1, 2)[:, 2:-1, 1:, 1:-1], t
    ),
    "expanded": lambda t: t[:1, :1].expand(t.shape) if t.numel() else t,
    "offset": lambda t: _into(t.new_full((t.numel() + 1,), math.nan)[1:].view(t.shape), t),
}  # fmt: skip


class Results(NamedTuple):
    y: Tensor  # [N, K, P, Q]
    dx: Tensor  # [N, C, H, W]
    dw: Tensor  # [A, C/groups]


def evaluate(
    problem: Case,
    operands: Operands,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    turned: int = 0,
    only: Pass | None = None,
) -> Results:
    """The three results by torch's own convolution in `dtype` and a memory format: in float64 the oracle.

    `turned` puts the same problem otherwise, so that sums have another order: bit 0 exchanges height and width,
    bit 1 runs through rows and columns backwards, bit 2 through channels and filters. `only` leaves the
    results of other passes empty.
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
        if turned:  # padded by hand and cut to what is read, so that backwards begins where forwards ends
            reach = [
                (n - 1) * a + d * (t - 1) + 1
                for n, a, d, t in zip((s.P, s.Q), stride, dilation, (s.R, s.S), strict=True)
            ]
            padded, padding = F.pad(x, (left, right, top, bottom))[:, :, : reach[0], : reach[1]], (0, 0)
        if s.taps == 1 and stride != (
            1,
            1,
        ):  # torch's weight gradient can corrupt the heap there: see SECURITY.md
            padded = F.pad(padded, (padding[1], padding[1], padding[0], padding[0]))
            padded, stride, padding = padded[:, :, :: stride[0], :: stride[1]], (1, 1), (0, 0)
            padded = padded.contiguous(memory_format=memory_format)
        if turned & 1:
            padded, dense, live = padded.mT, dense.mT, live.mT
            stride, dilation = stride[::-1], dilation[::-1]
        maps, filters = [2, 3] if turned & 2 else [], [0, 1] if turned & 4 else []
        padded, dense = padded.flip(maps + filters[1:]), dense.flip(maps + filters)
        live = live.flip([d - 1 for d in maps] + filters[:1])
        padded, dense = (t.contiguous(memory_format=memory_format) for t in (padded, dense))
        y = masked_conv2d(padded, dense, live, None, stride, padding, dilation, s.groups)
        y = y.flip(maps + filters[1:])
        y = y.mT if turned & 1 else y
        dy = operands.dy.to(dtype, memory_format=memory_format)
        wanted = [t for t in (x, weight) if t.requires_grad]
        found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy), strict=True)) if wanted else {}
    dx, dw = (found.get(id(t), t.new_empty(0)) for t in (x, weight))
    return _asked(Results(y.detach(), dx, dw), only)


_FEW = 1000  # results, of which the largest error says little about the next order of the sum


def _is_few(expected: Tensor) -> bool:
    """Of few results, or of equal ones, as equal images give."""
    return expected.numel() > 0 and len(expected.unique()) < _FEW


def _asked(results: Results, only: Pass | None) -> Results:
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


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next number of `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


@dataclass(frozen=True)
class Budget:
    """How far a result in `dtype` may lie from `expected` (float64): largest and root mean square error."""

    expected: Tensor
    dtype: torch.dtype
    largest: float
    rms: float
    plain: Budget | None = None  # where torch's other orders of summation widened it: without them
    orders: int = 0  # of those orders, and how many leave `plain`
    orders_beyond: int = 0

    @classmethod
    def of(cls, expected: Tensor, *torch_results: Tensor, others: Sequence[Tensor] = ()) -> Budget:
        """From the oracle and from what torch computes in the result's own dtype, in one or several ways; `others`
        are its results of the same problem put otherwise."""
        dtype = torch_results[0].dtype
        errors = [t.double() - expected for t in (*torch_results, *others)]
        largest, rms = max(map(_largest, errors)), max(map(_rms, errors))
        allowed = (2 * largest + 2 * ulp(_largest(expected), dtype), 2 * rms + 2 * ulp(_rms(expected), dtype))
        if not others:
            return cls(expected, dtype, *allowed)
        plain = cls.of(expected, *torch_results)
        beyond = sum(plain.failure(t) is not None for t in others)
        return cls(expected, dtype, *allowed, plain, len(others), beyond)

    def failure(self, actual: Tensor) -> str | None:
        """None within the budget, otherwise what is wrong, with the numbers."""
        if actual.shape != self.expected.shape or actual.dtype != self.dtype:
            shapes = list(actual.shape), list(self.expected.shape)
            return f"is {shapes[0]} {actual.dtype}, expected {shapes[1]} {self.dtype}"
        error = (actual.detach().to(self.expected.device).double() - self.expected).abs()
        if error.isnan().any():
            nan = error.isnan().nonzero()
            return f"has {len(nan)} NaN of {error.numel()}, the first at {nan[0].tolist()}"
        largest, rms = _largest(error), _rms(error)
        if largest > self.largest:
            where = (error == error.max()).nonzero()[0].tolist()
            return (
                f"is off by {largest:.3e} at {where} ({actual[tuple(where)].item():.6g}, expected "
                f"{self.expected[tuple(where)].item():.6g}); the budget is {self.largest:.3e}"
            )
        return f"has RMS error {rms:.3e}; the budget is {self.rms:.3e}" if rms > self.rms else None

    def check(self, actual: Tensor, what: str = "the result") -> None:
        """AssertionError with the numbers where the budget is exceeded."""
        failure = self.failure(actual)
        if failure:
            raise AssertionError(f"{what} {failure}")


class Budgets(NamedTuple):
    y: Budget
    dx: Budget
    dw: Budget


def budgets(problem: Case, operands: Operands, only: Pass | None = None) -> Budgets:
    """The budgets of the three passes, without an epilogue; with `only`, of that pass alone.

    oneDNN adds in another order for each memory format, and either is better at times (channels_last by 4 in
    a wgrad of 1e5 pixels, contiguous by 4 in a fprop of 175 products): the worse counts. Of a handful of results the
    largest error is luck: torch's own in another order leaves such a budget now and then. There, in float32, torch
    computes seven more orders, and the worst of all counts; `Budget.plain` is the budget without them.
    """
    wider = operands.x.dtype == torch.float64
    exact = (
        evaluate_wider(problem, operands) if wider else evaluate(problem, operands, torch.float64, only=only)
    )
    formats, dtype = (torch.contiguous_format, torch.channels_last), operands.x.dtype
    # For some shapes torch's own bfloat16 is wrong, crashes or corrupts memory (2.13, found by generated problems):
    # float32's result, rounded once, stands in for it.
    computed = torch.float32 if dtype == torch.bfloat16 else dtype
    own = [evaluate(problem, operands, computed, f, only=only) for f in formats]
    if dtype == torch.bfloat16:
        own = [Results(*(t.to(dtype) for t in results)) for results in own]
    exact = _asked(exact, only)
    turned: list[Results] = []
    if dtype == torch.float32 and any(
        _is_few(t) for t in exact
    ):  # narrower types lose more by their one rounding
        turned = [evaluate(problem, operands, dtype, turned=t, only=only) for t in range(1, 8)]
    return Budgets(
        *(
            Budget.of(expected, *(r[i] for r in own), others=[r[i] for r in turned if _is_few(expected)])
            for i, expected in enumerate(exact)
        )
    )


class Prepared(NamedTuple):
    """One configuration of a kernel made ready: a call on operands, and what it was predicted to take."""

    call: Callable[[Operands], Tensor]
    predicted: float  # seconds


def prepared(
    problem: Case, operands: Operands, which: Pass, kernel: str, repack: bool = False
) -> dict[str, Prepared]:
    """Every configuration of a kernel by name, "kernel[configuration]", the fastest prediction first.

    A call takes operands of the same sizes and layout and gives y, dx or dw. The weight is packed here, once;
    with `repack` in every call, as training does. RuntimeError with the reason where the kernel refuses.
    """
    from stripe_kernels import backends, ops, registry

    backends.load()
    like = operands.dy if which == "dgrad" else operands.x
    op = ops.StripeOp.of(*problem.arguments, kernel)
    last = ops.is_channels_last(like)
    asked = op.problem(problem.shape.input_size, like.dtype, like.device, last)
    chosen = registry.find(kernel)
    reason = chosen.refuse(asked, which)
    if reason:
        raise RuntimeError(f"{kernel} does not run {which} of {problem.name}: {reason}")

    def call(config: tuple[int, ...]) -> Callable[[Operands], Tensor]:
        runner = chosen.build(asked, which, config)
        if which == "wgrad":
            return lambda o: runner(o.dy, o.x)
        kept = None if repack else runner.pack(operands.weight)
        if which == "dgrad":
            return lambda o: runner(o.dy, runner.pack(o.weight) if kept is None else kept)
        return lambda o: runner(
            o.x, runner.pack(o.weight) if kept is None else kept, None, None, None, "none"
        )

    predicted = chosen.candidates(asked, which)
    configs = sorted(predicted, key=predicted.__getitem__)
    return {f"{kernel}{list(c) if c else ''}": Prepared(call(c), predicted[c]) for c in configs}


def withdraw(kernel: str) -> None:
    """Takes a kernel out of this process, as one that a check has lost."""
    from stripe_kernels import backends, registry

    backends.load()
    registry.withdraw(kernel)


def without_memory(problem: Case, dtype: torch.dtype, layout: str) -> Operands:
    """Operands of the case's sizes and layout on the "meta" device."""
    s = problem.shape

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy, residual = (LAYOUTS[layout](empty(*size)) for size in (s.input_size, s.output_size, s.output_size))
    weight = empty(problem.skeleton.stripes, s.group_c)
    return Operands(x, weight, dy, empty(s.K), empty(s.K), residual)


def predicted_on_gpu(
    problem: Case, operands: Operands, which: Pass, kernel: str, tf32: bool = False
) -> dict[tuple[int, ...], Prepared]:
    """A kernel's configurations on a GPU that need not be there, the fastest prediction first; {} where it refuses.
    Their calls launch nothing: they compile what they would launch, into Triton's cache on disk."""
    from stripe_kernels import backends, ops, registry

    backends.load()
    like = operands.dy if which == "dgrad" else operands.x
    op = ops.StripeOp.of(*problem.arguments, kernel)
    found = op.problem(problem.shape.input_size, like.dtype, like.device, ops.is_channels_last(like))
    asked, chosen = replace(found, device="cuda", tf32=(tf32, tf32)), registry.find(kernel)
    if chosen.refuse(asked, which):
        return {}

    def call(config: tuple[int, ...]) -> Callable[[Operands], Tensor]:
        def compile_all(o: Operands) -> Tensor:
            runner = chosen.build(asked, which, config)
            result: Tensor
            with registry.provided("compiling")(), torch.inference_mode():  # type: ignore[misc]
                if which == "wgrad":
                    result = runner(o.dy, o.x)
                elif which == "dgrad":
                    result = runner(o.dy, runner.pack(o.weight))
                else:
                    packed = runner.pack(o.weight)
                    result = runner(o.x, packed, None, None, None, "none")
                    if o.x.dtype == torch.bfloat16:  # what a network's layers have folded in
                        runner(o.x, packed, o.bias, None, None, "relu")
                        runner(o.x, packed, o.bias, None, o.residual, "relu")
            return result

        return compile_all

    times = chosen.candidates(asked, which)
    return {c: Prepared(call(c), times[c]) for c in sorted(times, key=times.__getitem__)}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN (integers: the largest), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def list_and_calls(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """The network `model` is compacted to, untuned and without lanes: "list" makes one native call of layers that
    follow each other, "calls" one for each, both bound to inputs like `x`."""
    from stripe_kernels import ops
    from stripe_kernels.compile.network import Network
    from stripe_kernels.compile.optimize import compact

    body = compact(model, (x,)).body
    networks = {"list": Network(body), "calls": Network(body)}
    for name, network in networks.items():
        network.resident_from = None
        hidden = mock.patch.object(ops, "call_list", side_effect=ImportError)
        with torch.inference_mode(), hidden if name == "calls" else nullcontext():
            network(x)
    return dict(networks)
