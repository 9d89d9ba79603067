"""Compiles the Triton kernels that the later stages will launch, on all cores: one after the other, as they are
met, compilers would take longer than the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.gpu_check.checks import PASSES, cases
from bench.gpu_check.rows import CONFIGS, DTYPES, settings
from stripe_kernels import backends, registry
from stripe_kernels.ops import StripeOp, is_channels_last
from stripe_kernels.registry import Pass
from stripe_kernels.testing import LAYOUTS, Case, Operands

KERNELS = ("triton", "stripe_gemm")


def calls(names: tuple[str, ...], dry_run: bool = False) -> Iterator[tuple[str, str, partial[None]]]:
    """(layer, what, call) for all that the layers' rows and the correctness checks of `names` run, in their order."""
    for setting in settings(dry_run):
        last = "channels_last"
        yield (
            f"{setting.name} {setting.density}",
            setting.what,
            partial(compile_call, setting.case(), setting.dtype, last, setting.which, CONFIGS),
        )
    for case, dtype, layout in cases(names):
        short = str(dtype)[6:]
        for which in PASSES:
            what = f"{which} {short} {case.name}"
            yield case.name, what, partial(compile_call, case, short, layout, which, 1)


def compile_call(case: Case, dtype: str, layout: str, which: Pass, configs: int) -> None:
    """Every launch of one call in the `configs` best predicted configurations, from tensors without memory."""
    from stripe_kernels.backends.triton.launch import compiling

    backends.load()
    o = _without_memory(case, DTYPES[dtype], layout)
    like = o.dy if which == "dgrad" else o.x
    rounded = dtype == "tf32"
    for name in KERNELS:
        op = StripeOp.of(*case.arguments, name)
        found = op.problem(case.shape.input_size, like.dtype, like.device, is_channels_last(like))
        problem = replace(found, device="cuda", tf32=(rounded, rounded))
        kernel = registry.find(name)
        if kernel.refuse(problem, which):
            continue
        predicted = kernel.candidates(problem, which)
        for config in sorted(predicted, key=predicted.__getitem__)[:configs]:
            runner = kernel.build(problem, which, config)
            with compiling(), torch.inference_mode():
                if which == "wgrad":
                    runner(o.dy, o.x)
                elif which == "dgrad":
                    runner(o.dy, runner.pack(o.weight))
                else:
                    packed = runner.pack(o.weight)
                    runner(o.x, packed, None, None, None, "none")
                    if configs > 1 and dtype == "bfloat16":  # what a network's layers have folded in
                        runner(o.x, packed, o.bias, None, None, "relu")
                        runner(o.x, packed, o.bias, None, o.residual, "relu")


def _without_memory(case: Case, dtype: torch.dtype, layout: str) -> Operands:
    """Operands of the case's sizes and layout on the "meta" device."""
    s = case.shape

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy, residual = (LAYOUTS[layout](empty(*size)) for size in (s.input_size, s.output_size, s.output_size))
    weight = empty(case.skeleton.stripes, s.group_c)
    return Operands(x, weight, dy, empty(s.K), empty(s.K), residual)


def compile_part(names: tuple[str, ...], part: int, parts: int) -> list[str]:
    """Every `parts`-th layer from number `part`, so that its filters are clustered once; what failed, with the
    reason."""
    failed = []
    groups: dict[str, int] = {}
    for layer, what, call in calls(names):
        if groups.setdefault(layer, len(groups)) % parts == part:
            try:
                call()
            except Exception as error:  # noqa: BLE001 -- the stage that needs it will say so again
                failed.append(f"{what}: {str(error)[:200]}")
    return failed
