"""Compiles the Triton kernels that the later stages will launch, on all cores: one after the other, as they are
met, compilers would take longer than the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.gpu_check.checks import PASSES, cases
from bench.gpu_check.rows import CONFIGS, DTYPES, settings
from stripe_kernels.testing import Case, Pass, case, predicted_on_gpu, without_memory

KERNELS = ("triton", "triton_stem", "stripe_gemm")
STEM = case("a network's first layer", N=2, C=3, H=32, W=32, K=64, padding=(1, 1), density=1.0)


def calls(names: tuple[str, ...], dry_run: bool = False) -> Iterator[tuple[str, str, partial[None]]]:
    """(layer, what, call) for all that the correctness checks of `names` and the layers' rows run, in their order: a
    row that comes late may be left out, a check not."""
    for one, dtype, layout in cases(names):
        short = str(dtype)[6:]
        for which in PASSES:
            what = f"{which} {short} {one.name}"
            yield one.name, what, partial(compile_call, one, short, layout, which, 1)
    if not dry_run:
        yield STEM.name, STEM.name, partial(compile_call, STEM, "bfloat16", "channels_last", "fprop", CONFIGS)
    for setting in settings(dry_run):
        last = "channels_last"
        yield (
            f"{setting.name} {setting.density}",
            setting.what,
            partial(compile_call, setting.case(), setting.dtype, last, setting.which, CONFIGS),
        )


def compile_call(case: Case, dtype: str, layout: str, which: Pass, configs: int) -> None:
    """Every launch of one call in the `configs` best predicted configurations, from tensors without memory."""
    operands = without_memory(case, DTYPES[dtype], layout)
    for kernel in KERNELS:
        found = predicted_on_gpu(case, operands, which, kernel, tf32=dtype == "tf32")
        for call, _ in list(found.values())[:configs]:
            call(operands)


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
