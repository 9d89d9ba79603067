"""Who competes over one layer. A contestant is a name and a function from a job to its entrant, or Refused.

    stripe   auto, auto channels_last, and every kernel of list_kernels() under its own name
    dense    what runs the same convolution with the zeros in it: torch in both memory formats, torch.compile,
             and the inference runtimes
    slim     a dense convolution with whole channels removed, equal MACs: what one would pick instead
    paper    the deployment path of the stripe pruning paper: a 1x1 convolution to A channels, shifted adds

Whoever cannot run a job says why; whoever computes something else than the oracle is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import runtimes
from bench.job import Entrant, Job, Refused
from stripe_kernels import StripeConv2d, list_kernels
from stripe_kernels.testing import Budget, poisoned_memory

Contestant = Callable[[Job], Entrant]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _results(job: Job, run: Callable[[], object], live_rows: bool = False) -> Callable[[], str | None]:
    """A check that runs the contestant once over poisoned memory; live_rows: dw is dense, [K, C/g, R, S]."""

    def rows(dw: Tensor) -> Tensor:
        return dw.permute(0, 2, 3, 1)[job.skeleton] if live_rows else dw

    def check() -> str | None:
        with poisoned_memory():
            out = run()
        if job.which == "step":
            y, dx, dw = out
            return job.oracle.wrong(y.detach(), dx, rows(dw))
        if job.which == "wgrad":
            return job.oracle.wrong(dw=rows(out))
        return job.oracle.wrong(**{{"fprop": "y", "dgrad": "dx"}[job.which]: out})

    return check


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fprop, dgrad and wgrad through autograd."""
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.weight), dy)


def stripe_layer(job: Job, kernel: str) -> StripeConv2d:
    """The job's layer with a kernel's name."""
    la = job.layer
    layer = StripeConv2d(
        la.C,
        la.K,
        (la.R, la.S),
        la.stride,
        la.padding,
        groups=la.groups,
        bias=False,
        skeleton=job.live,
        dtype=job.dtype,
    )
    with torch.no_grad():
        layer.weight.copy_(job.operands.weight)
    layer.kernel = kernel
    return layer.eval().requires_grad_(job.which != "fprop")


def stripe(kernel: str, memory_format: str, job: Job) -> Entrant:
    """StripeConv2d as a user calls it. In dgrad and step the weight needs a gradient: each call packs it."""
    layer, o = stripe_layer(job, kernel), job.operands
    x, dy = (t.contiguous(memory_format=FORMATS[memory_format]) for t in (o.x, o.dy))
    operators = torch.ops.stripe_kernels
    calls: dict[str, Callable[[], object]] = {
        "fprop": partial(layer, x),
        "dgrad": lambda: operators.dgrad(dy, layer.weight, x.shape[2:], *job.case.arguments, kernel),
        "wgrad": lambda: operators.wgrad(dy, x, *job.case.arguments, kernel),
        "step": partial(_step, layer, x.detach().requires_grad_(job.which == "step"), dy),
    }
    run = _mode(job, calls[job.which])
    try:
        run()
    except RuntimeError as error:  # a kernel named explicitly runs or says why it cannot
        if kernel == "auto":
            raise
        raise Refused(str(error).rpartition(f"{kernel}: ")[2]) from error
    return Entrant("stripe", run, _results(job, run), job.macs)


def _mode(job: Job, call: Callable[[], object]) -> Callable[[], object]:
    """Training takes gradients as training does; everything else runs without autograd."""
    if job.which == "step":
        return call
    mode = torch.inference_mode() if job.which == "fprop" else torch.no_grad()
    return mode(call)


def dense_conv(job: Job, weight: Tensor, groups: int, memory_format: str) -> nn.Conv2d:
    """A plain convolution with the job's stride and padding."""
    la, (k, c, r, s) = job.layer, weight.shape
    conv = nn.Conv2d(c * groups, k, (r, s), la.stride, la.padding, groups=groups, bias=False, dtype=job.dtype)
    conv.weight = nn.Parameter(weight.clone(memory_format=FORMATS[memory_format]), job.which != "fprop")
    return conv.eval()


def _dense_call(job: Job, conv: nn.Module, weight: Tensor, x: Tensor, dy: Tensor) -> Callable[[], object]:
    la = job.layer

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            dy, x, weight, None, [la.stride] * 2, la.padding, [1, 1], False, [0, 0], la.groups, mask
        )[mask.index(True)]

    calls: dict[str, Callable[[], object]] = {
        "fprop": partial(conv, x),
        "dgrad": backward([True, False, False]),
        "wgrad": backward([False, True, False]),
        "step": partial(_step, conv, x.detach().requires_grad_(job.which == "step"), dy),
    }
    return _mode(job, calls[job.which])


def eager(memory_format: str, job: Job) -> Entrant:
    """torch with oneDNN."""
    conv = dense_conv(job, job.dense_weight, job.layer.groups, memory_format)
    x, dy = (t.contiguous(memory_format=FORMATS[memory_format]) for t in (job.operands.x, job.operands.dy))
    run = _dense_call(job, conv, conv.weight.detach(), x, dy)
    return Entrant("dense", run, _results(job, run, live_rows=True), job.dense_macs)


def compiled(memory_format: str, job: Job) -> Entrant:
    """torch.compile with frozen weights, which lets it lay them out once."""
    if job.which != "fprop":
        raise Refused("times inference; a training step is timed on whole networks")
    conv = dense_conv(job, job.dense_weight, job.layer.groups, memory_format)
    x = job.operands.x.contiguous(memory_format=FORMATS[memory_format])
    torch.compiler.reset()
    run = torch.no_grad()(partial(torch.compile(conv, options={"freezing": True}), x))
    return Entrant("dense", run, lambda: job.oracle.far(run()), job.dense_macs)


def slim_channels(c: int, k: int, density: float) -> tuple[int, int]:
    """Input channels and filters of a dense layer with c * k * density products: both cut by the same
    factor and, from 32 up, multiples of 8 as one would round them."""

    def near(value: float, most: int) -> int:
        step = 8 if most >= 32 else 1
        return min(most, max(step, round(value / step) * step))

    slim_c = near(c * sqrt(density), c)
    return slim_c, near(density * c * k / slim_c, k)


def slim(memory_format: str, job: Job) -> Entrant:
    """Whole channels removed to equal MACs. It computes another function: its own oracle checks it."""
    la = job.layer
    if job.which != "fprop":
        raise Refused("timed in fprop and on whole networks")
    if la.groups not in (1, la.C) or la.groups == la.C != la.K:
        raise Refused(f"channel pruning of {la.groups} groups is not defined here")
    if la.groups == 1:
        c, k = slim_channels(la.C, la.K, job.live.density)
        weight = job.operands.weight.new_empty(k, c, la.R, la.S).normal_(generator=_generator()) / sqrt(
            c * la.R * la.S
        )
    else:
        c = max(1, round(job.live.density * la.C))
        weight = job.operands.weight.new_empty(c, 1, la.R, la.S).normal_(generator=_generator())
    conv = dense_conv(job, weight, 1 if la.groups == 1 else c, memory_format)
    x = job.operands.x[:, :c].contiguous(memory_format=FORMATS[memory_format])
    run = torch.inference_mode()(partial(conv, x))

    def check() -> str | None:
        some = x[job.oracle.images]
        exact = F.conv2d(some.double(), weight.double(), None, la.stride, la.padding, 1, conv.groups)
        own = F.conv2d(some, weight, None, la.stride, la.padding, 1, conv.groups)
        return Budget.of(exact, own).failure(run()[job.oracle.images])

    share = weight.numel() / (la.K * la.C // la.groups * la.R * la.S)
    return Entrant("slim", run, check, job.dense_macs * share)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def paper(job: Job) -> Entrant:
    """Z = conv1x1(x, W) with the A live stripes as filters, then y[k] += Z[a] shifted by the tap of stripe a.

    Stripes are sorted by tap, so that each tap adds one slice of Z. y[:, k] += Z instead of index_add_ took
    1.3 to 1.9 times as long (measured on four layers).
    """
    la, o, s = job.layer, job.operands, job.case.shape
    if job.which != "fprop":
        raise Refused("the paper deploys inference only")
    if la.groups > 1:
        raise Refused("one 1x1 convolution reads all channels; groups > 1")
    k, r, t = job.skeleton.nonzero(as_tuple=True)
    order = torch.argsort(r * la.S + t, stable=True)
    weight, filters = o.weight[order][:, :, None, None].contiguous(), k[order]
    counts = torch.bincount(r * la.S + t, minlength=la.R * la.S).tolist()
    shifts = []  # filters, slice of Z's channels, output rows and columns, input rows and columns
    first = 0
    for tap, count in enumerate(counts):
        rows = _window(tap // la.S - la.padding[0], s.H, s.P, la.stride)
        cols = _window(tap % la.S - la.padding[1], s.W, s.Q, la.stride)
        if count and rows and cols:
            part = slice(first, first + count)
            shifts.append((filters[part], part, rows[0], cols[0], rows[1], cols[1]))
        first += count

    @torch.inference_mode()
    def run() -> Tensor:
        z = F.conv2d(o.x, weight)  # [N, A, H, W]
        y = z.new_zeros(s.output_size)
        for f, part, p, q, h, w in shifts:
            y[:, :, p, q].index_add_(1, f, z[:, part, h, w])
        return y

    return Entrant("paper", run, lambda: job.oracle.far(run()), s.N * s.H * s.W * len(filters) * s.C)


def _window(offset: int, size: int, out: int, stride: int) -> tuple[slice, slice] | None:
    """Output positions that read inside the image at `offset`, and the input positions they read."""
    first = max(0, -(offset // stride))
    last = min(out - 1, (size - 1 - offset) // stride)
    if last < first:
        return None
    start = first * stride + offset
    return slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)


def kernel_names(which: str) -> list[str]:
    """Registered kernels: "all", "none", "best" (of this machine's widest instruction sets), or a comma list."""
    names = [n for n in list_kernels() if n != "reference"]
    if which in ("all", "none"):
        return names if which == "all" else []
    if which == "best":
        isa = torch.backends.cpu.get_cpu_capability().lower()
        return [n for n in names if n.startswith("cpu_") and n.endswith((isa, isa + "bf16", "amx"))]
    chosen = which.split(",")
    unknown = set(chosen) - set(list_kernels())
    if unknown:
        raise ValueError(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(list_kernels())}")
    return chosen


def not_compiled(*_: object) -> Entrant:
    raise Refused("not asked for: --compile (it takes its time)")


def contestants(kernels: list[str], compile_: bool = True) -> dict[str, Contestant]:
    """Every contestant by name, in the order of the records. Without `compile_`, torch.compile refuses."""
    return {
        "auto": partial(stripe, "auto", "contiguous"),
        "auto channels_last": partial(stripe, "auto", "channels_last"),
        **{k: partial(stripe, k, "contiguous") for k in kernels},
        **{f"eager {f}": partial(eager, f) for f in FORMATS},
        **{f"compile {f}": partial(compiled, f) if compile_ else not_compiled for f in FORMATS},
        "onnxruntime": runtimes.onnxruntime_layer,
        "openvino": runtimes.openvino_layer,
        **{f"slim {f}": partial(slim, f) for f in FORMATS},
        "paper": paper,
    }
