"""Coverage-guided fuzzing of the native boundary: any integers give a kernel that stays in bounds, or a ValueError.

    python -m tests.fuzz.native -max_total_time=600 CORPUS      (make fuzz)

Shapes, stripe lists and tilings are drawn from the input, sound ones bent in a few places. What is accepted runs on
tensors that end at a forbidden page, so that one byte too far ends the process: by itself, or as a training step runs
it, by a call list whose numbers of slots and tensors are bent as well. libFuzzer sees the branches of this file, not
those of the extension (gcc has no counters for it): `seeds` and the guard pages do the work.
"""

from __future__ import annotations

import collections
import math
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["stripe_kernels.packed", "stripe_kernels.skeleton"]):
    import numpy as np
    import torch

    from stripe_kernels import _cpu
    from stripe_kernels.packed import StripeIndex
    from stripe_kernels.skeleton import FilterSkeleton
from tests.guarded import guarded

ISAS = _cpu.isas()
ODD = (-(2**31), -2, -1, 0, 1, 2, 3, 7, 16, 64, 2**20, 2**30, 2**31 - 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by the boundary's codes
outcomes: collections.Counter[str] = collections.Counter()
ABSURD = 1 << 24  # entries of a kernel's tables, for which memory may be missing
LENGTH = 400  # bytes of an input, shorter ones filled up with what follows from them
LARGEST = 1 << 14  # elements of a tensor worth running
X, Y, WEIGHT, PACKED, BIAS = range(5)  # numbers of a list's tensors, and of the slots they lie in
PACK = "add_pack", (WEIGHT, PACKED)
FPROP = PACK, ("add_packed_fprop", (PACKED, BIAS, X, Y))
STEPS = {2: (PACK, ("add_dgrad", (PACKED, Y, X))), 3: (("add_wgrad", (X, Y, WEIGHT)),)}  # by kind, else FPROP


@atheris.instrument_func
def bent(data: atheris.FuzzedDataProvider, values: list[int], times: int, most: int = 2**31) -> list[int]:
    """`values` with up to `times` entries replaced (by `most` at most), dropped, doubled or exchanged."""
    for _ in range(data.ConsumeIntInRange(0, times)):
        if not values:
            break
        i, j = (data.ConsumeIntInRange(0, len(values) - 1) for _ in range(2))
        kind = data.ConsumeIntInRange(0, 4)
        if kind == 0:
            values[i] = min(most, ODD[data.ConsumeIntInRange(0, len(ODD) - 1)])
        elif kind == 1:
            values[i] += data.ConsumeIntInRange(-2, 2)
        elif kind == 2:
            del values[i]
        elif kind == 3:
            values.insert(i, values[j])
        else:
            values[i], values[j] = values[j], values[i]
    return values


def small(data: atheris.FuzzedDataProvider, least: int, most: int) -> int:
    return data.ConsumeIntInRange(least, most)


@atheris.instrument_func
def one_input(raw: bytes) -> None:
    # libFuzzer shortens inputs, and what is short has no images and no bends. Integers are taken from the end.
    data = atheris.FuzzedDataProvider(random.Random(raw).randbytes(LENGTH - min(LENGTH, len(raw))) + raw)
    groups = small(data, 1, 3)
    n, c, h, w, k, r, s = (small(data, 0 if i == 0 else 1, 5) for i in range(7))
    matrix = "amx" in ISAS and small(data, 0, 5) == 5
    c, k = c * groups * (32 if matrix else 1), k * groups
    stride, dilation = (small(data, 1, 3), small(data, 1, 3)), (small(data, 1, 2), small(data, 1, 2))
    pad = small(data, 0, 3), small(data, 0, 3)
    p, q = (
        max(0, (size + 2 * margin - d * (taps - 1) - 1) // step + 1)
        for size, margin, d, taps, step in zip((h, w), pad, dilation, (r, s), stride, strict=True)
    )
    live = np.frombuffer(data.ConsumeBytes(k * r * s).ljust(k * r * s, b"\1"), np.uint8).reshape(k, r, s) & 1
    index = StripeIndex.of(FilterSkeleton(live.astype(np.bool_)), groups)
    odd = small(data, 0, 1)  # every other kernel is sound
    layer = [n, c, h, w, k, r, s, p, q, *stride, *pad, *dilation, groups]
    sizes = bent(data, layer, odd, 64)  # what is large and sound takes its memory
    lists = [bent(data, v.tolist(), 2 * odd) for v in (index.tap_ptr, index.filter, index.row)]
    isa = "amx" if matrix else ISAS[small(data, 0, len(ISAS) - 1)]
    kind = 5 if matrix else small(data, 0, 4)
    tiling = [small(data, 0, 2), small(data, 1, 4), small(data, 1, 4), small(data, 1, 4), small(data, 1, 12)]
    if tiling[0] == 2:
        tiling[1] *= _cpu.lanes(isa)
    tiling = bent(data, {1: [1, 2], 4: [3]}.get(kind, tiling), odd, 64)
    try:
        if kind == 3:
            kernel = _cpu.Wgrad(sizes, *lists, tiling[0] if tiling else 0, isa)
        else:
            make = {0: "Fprop", 1: "FpropFilters", 2: "Dgrad", 4: "FpropTaps", 5: "FpropMatrix"}[kind]
            kernel = getattr(_cpu, make)(sizes, *lists, tiling, isa)
    except (ValueError, TypeError) as error:  # TypeError: beyond 32 bits
        count(type(error).__name__)
        return
    except MemoryError:  # a kernel's tables have an entry for every output pixel and tap at most
        entries = math.prod(max(1, sizes[i]) for i in (0, 5, 6, 7, 8))
        if entries < ABSURD:
            raise
        count("MemoryError")
        return
    threads = small(data, 1, 3)
    code = 1 if kind == 5 or (kind == 0 and _cpu.bf16_channels(isa) == 2) else small(data, 0, len(DTYPES) - 1)
    run(data, kernel, kind, sizes, len(lists[1]), threads, code)


def count(outcome: str) -> None:
    outcomes[outcome] += 1
    if outcomes.total() % 20000 == 0:
        print(dict(outcomes), flush=True)


@atheris.instrument_func
def run(
    data: atheris.FuzzedDataProvider,
    kernel: Any,
    kind: int,
    sizes: list[int],
    stripes: int,
    threads: int,
    code: int,
) -> None:
    n, c, h, w, k, _, _, p, q, *_, groups = sizes
    if max(n * c * h * w, n * k * p * q, stripes * c) > LARGEST:
        return
    floats = 0 if kind == 3 else kernel.packed_floats
    if floats > LARGEST * 64:
        return
    x, y, weight = (
        torch.ones(*v, dtype=DTYPES[code]) for v in ((n, c, h, w), (n, k, p, q), (stripes, c // groups))
    )
    empty = not min(x.numel(), y.numel(), stripes)
    with ExitStack() as stack:
        x, y, weight = (stack.enter_context(guarded(t, True, True)) for t in (x, y, weight))
        packed, bias = torch.empty(floats), torch.zeros(k)
        if small(data, 0, 1):
            listed(data, kernel, kind, [x, y, weight, packed, bias], threads, code, empty)
        else:
            alone(kernel, kind, [x, y, weight, packed], threads, code)
            count("ran, with nothing to compute" if empty else "ran")
        del x, y, weight


@atheris.instrument_func
def alone(kernel: Any, kind: int, tensors: list[torch.Tensor], threads: int, code: int) -> None:
    x, y = ((t.data_ptr(), code, t.stride()) for t in tensors[:WEIGHT])
    weight, packed = (t.data_ptr() for t in tensors[WEIGHT:])
    if kind == 3:
        kernel.run(threads, *x, *y, weight, code)
        return
    kernel.pack_weight(weight, code, packed)
    if kind == 2:
        kernel.run(threads, *y, packed, *x)
    else:
        kernel.run(threads, *x, packed, *y, 0, 0, 0, (0, 0, 0, 0), 0)


@atheris.instrument_func
def listed(
    data: atheris.FuzzedDataProvider,
    kernel: Any,
    kind: int,
    tensors: list[torch.Tensor],
    threads: int,
    code: int,
    empty: bool,
) -> None:
    """The kernel's part of a training step. Numbers that are sound but another tensor's are not run: sizes are not the
    list's to check."""
    order = list(range(len(tensors)))
    odd = small(data, 0, 1)
    calls = _cpu.CallList()
    try:
        slots = bent(data, list(order), odd)[: len(order)]
        for slot, t in zip(slots, tensors, strict=False):
            calls.add_slot(code if t.dim() > 1 else 0, (*t.stride(), 0, 0, 0)[:4], slot)
        known = slots == order
        for name, sound in STEPS.get(kind, FPROP):
            numbers = bent(data, list(sound), odd)
            getattr(calls, name)(kernel, *numbers)
            known &= numbers == list(sound)
        if known or max(slots) >= len(order):
            calls.run(threads, 0, [t.data_ptr() for t in tensors])
            assert known, f"slots {slots} of {len(order)}"
    except (ValueError, TypeError) as error:  # TypeError: too many numbers or too few, or beyond 32 bits
        count(f"list: {type(error).__name__}")
        return
    count(
        "list: of other tensors"
        if not known
        else "list: ran, with nothing to compute"
        if empty
        else "list: ran"
    )


def main() -> None:
    torch.set_num_threads(1)
    folders = [Path(a) for a in sys.argv[1:] if not a.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        for seed in range(200):
            (folders[0] / f"seed{seed}").write_bytes(random.Random(seed).randbytes(LENGTH))
    atheris.Setup([*sys.argv, "-len_control=0", "-rss_limit_mb=4096", "-max_len=512"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
