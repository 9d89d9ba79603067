"""Plants faults in a copy of the wgmma kernels and their layouts, and shows that the emulation notices each.

    python -m tests.cuda.mutate [FAULT ...] [--record tests/records/cuda-mutations.json]

Without a fault the same problems have to agree with the oracle; with one, some result has to be wrong, two runs have to
differ, or the emulation has to stop: a wait that never ends, memory out of bounds, products nobody waited for.

The record has what noticed each fault, and the hash of the sources (bench/gpu_check/record.py) that it was planted in,
null where it was planted before the record said so. A run of some faults leaves the others' entries as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.cuda import emulated

ROOT = emulated.ROOT
SECONDS = 600  # of one run; then it counts as noticed


@dataclass(frozen=True)
class Fault:
    file: str
    right: str
    wrong: str


SUM, SPREAD = "csrc/cuda/stripe_sum.cu", "csrc/cuda/stripe_spread.cu"
KERNEL, DGRAD = "csrc/cuda/fprop_sm90.cu", "csrc/cuda/dgrad_sm90.cu"
TAPS, TILES = "csrc/cuda/fprop_taps_sm90.cu", "csrc/cuda/tiles_sm90.h"
WGRAD = "csrc/cuda/wgrad_sm90.cu"
WHOLE = "csrc/cuda/fprop_whole_sm90.cu"
# The folders of their parts: a fault in one has that kernel compiled again.
PARTS = {
    "fprop_stripes": KERNEL,
    "fprop_taps": TAPS,
    "fprop_whole": WHOLE,
    "dgrad_gather": DGRAD,
    "wgrad_gather": WGRAD,
}
STRIPES_LOAD, STRIPES_MULTIPLY, STRIPES_PIXELS = (
    f"csrc/cuda/fprop_stripes/{part}.h" for part in ("load", "multiply", "pixels")
)
TAPS_LOAD, TAPS_SHARED = "csrc/cuda/fprop_taps/load.h", "csrc/cuda/fprop_taps/shared.h"
WHOLE_LOAD, WHOLE_STORE = "csrc/cuda/fprop_whole/load.h", "csrc/cuda/fprop_whole/store.h"
DGRAD_LOAD = "csrc/cuda/dgrad_gather/load.h"
WGRAD_LOAD, WGRAD_MULTIPLY, WGRAD_SHARED = (
    f"csrc/cuda/wgrad_gather/{part}.h" for part in ("load", "multiply", "shared")
)
WGMMA = "stripe_kernels/backends/cuda_wgmma.py"
_ENDED = "    wgmma_wait<0>();\n#pragma unroll\n    for (int t = 0; t < Tiles; ++t) "
FAULTS = {
    "stripes: a sum goes on where one begins": Fault(SUM, "(begins ? 0.f : sum[i])", "sum[i]"),
    "stripes: a tap meets one column beside the map": Fault(SUM, "shifts[i].j, t.map_w)", "shifts[i].j, t.map_w + 1)"),
    "stripes: the same rows again": Fault(SUM, "min(r + kAtOnce, count - kAtOnce)", "min(r, count - kAtOnce)"),
    "stripes: a row of another map": Fault(SUM, "* map.rows + p) * map.columns", "* map.columns + p) * map.columns"),
    "stripes: no zeros beside dy": Fault(
        SPREAD, "rows + range.count * pitch + i * 16) = zeros", "rows + i * 16) = zeros"
    ),
    "stripes: copies not awaited": Fault(SPREAD, "  copies_wait();\n", ""),
    "stripes: a piece of another tap": Fault(SPREAD, "t.tables[t.tap_of + piece]", "t.tables[t.tap_of]"),
    "operands read without their swizzle": Fault(
        "csrc/cuda/matrix_descriptor.h", "kSwizzle128 = 1;", "kSwizzle128 = 0;"
    ),
    "eight rows in half their distance": Fault("csrc/cuda/matrix_descriptor.h", "1024 >> 4", "512 >> 4"),
    "every other step of channels": Fault(STRIPES_MULTIPLY, "w + 2 * k, c + k", "w + 4 * k, c + k"),
    "weights and ones swizzled for other rows": Fault(
        WGMMA, "pieces[..., column, place ^ column % 8, :]", "pieces[..., column, place ^ column % 4, :]"
    ),
    "a column added to the filter beside its own": Fault(
        WGMMA, "[k - bundle.first for k, _", "[max(0, k - bundle.first - 1) for k, _"
    ),
    "the patch begins one pixel further": Fault(
        STRIPES_LOAD, "at.tile.j + at.segment.origin_w", "at.tile.j + at.segment.origin_w + 1"
    ),
    "a tap meets one row beside the image": Fault(
        STRIPES_PIXELS, "static_cast<unsigned>(rows) &&", "static_cast<unsigned>(rows + 1) &&"
    ),
    "no row of zeros": Fault(KERNEL, "i % 8 * 16) = {0, 0, 0, 0};", "i % 8 * 16);"),
    "x awaited in the wrong phase": Fault(
        STRIPES_LOAD,
        "mbarrier_wait(s.x_empty + chunk, patch.parity ^ 1);",
        "mbarrier_wait(s.x_empty + chunk, patch.parity);",
    ),
    "x not awaited": Fault(STRIPES_MULTIPLY, "    mbarrier_wait(s.x_full + chunk, patch.parity);\n", ""),
    "weights not awaited": Fault(
        STRIPES_MULTIPLY, "    mbarrier_wait(s.full + ring.stage, ring.parity);\n  };", "  };"
    ),
    "what columns add to not awaited": Fault(
        KERNEL, "    mbarrier_wait(s.full + ring.stage, ring.parity);\n    const Record", "    const Record"
    ),
    "a full stage overwritten": Fault(
        STRIPES_LOAD,
        "    mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);\n",
        "",
    ),
    "more bytes announced than come": Fault(
        STRIPES_LOAD, "kBytes + (last ? kRecord : 0));", "kBytes + (last ? kRecord : 0) + 16);"
    ),
    "a stage given back while it is read": Fault(STRIPES_MULTIPLY, "        wgmma_wait<1>();\n", ""),
    "products put away before they end": Fault(KERNEL, _ENDED + "wgmma_keep(acc[t]);\n    scatter", "    scatter"),
    "registers filled while wgmma reads them": Fault(
        KERNEL, "acc, s.products);\n    wgmma_wait<0>();\n", "acc, s.products);\n"
    ),
    "x given back by the first block": Fault(KERNEL, "last = uniform(at.last());", "last = uniform(at.fresh);"),
    "gathered before all products are there": Fault(
        KERNEL, "    computers_barrier();  // all rows of the products are there\n", ""
    ),
    "products put where others still gather": Fault(
        KERNEL, "    computers_barrier();  // nobody reads the products of the block before any more\n", ""
    ),
    "sums of two bundles in one": Fault(KERNEL, "uniform(!before.first)", "uniform(1)"),
    "stored where the last tile was": Fault(KERNEL, "    if (listed != at.item) pixels", "    if (listed < 0) pixels"),
    "dgrad: dy not awaited": Fault(DGRAD, "    mbarrier_wait(s.ready, parity);\n", ""),
    "dgrad: a patch overwritten while it is read": Fault(
        DGRAD_LOAD, "        mbarrier_wait(s.read, parity ^ 1);\n", ""
    ),
    "dgrad: registers filled while wgmma reads them": Fault(
        DGRAD, "gather(s, pixels, s.steps[i + 1], odd);", "gather(s, pixels, s.steps[i + 1], even);"
    ),
    "dgrad: stored while others gather": Fault(
        DGRAD, "    computers_barrier();  // nobody reads the patch any more\n", ""
    ),
    "dgrad: no zeros behind the patch": Fault(
        TILES, "zeros_of(l) + i % 8 * 16) = {0, 0, 0, 0};", "zeros_of(l) + i % 8 * 16);"
    ),
    "dgrad: weights not awaited": Fault(
        DGRAD,
        "      mbarrier_wait(s.full + ring.stage, ring.parity);\n"
        "      multiply<T, N>(s.weights + ring.stage * kStripes * N * 2, 1, odd",
        "      multiply<T, N>(s.weights + ring.stage * kStripes * N * 2, 1, odd",
    ),
    "dgrad: an eight read through the tap before": Fault(
        "stripe_kernels/backends/cuda_gather.py", "taps.append(np.full(len(f), number, np.int32))",
        "taps.append(np.full(len(f), max(0, number - 1), np.int32))",
    ),
    "taps: x not awaited": Fault(TAPS, "    mbarrier_wait(s.ready, parity);\n", ""),
    "taps: a patch overwritten while it is read": Fault(
        TAPS_LOAD, "mbarrier_wait(s.read, parity ^ 1);", ";"
    ),
    "taps: weights not awaited": Fault(
        TAPS, "if (waits) mbarrier_wait(s.full + ring.stage, ring.parity);", ""
    ),
    "taps: a full stage overwritten": Fault(
        TAPS_LOAD, "        mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);\n", ""
    ),
    "taps: a stage given back while it is read": Fault(
        TAPS, "            wgmma_wait<1>();\n            if (p == 0)", "            if (p == 0)"
    ),
    "taps: registers filled while wgmma reads them": Fault(
        TAPS, "(part + 1) % S::Parts, behind);", "(part + 1) % S::Parts, current);"
    ),
    "taps: sums rounded before they end": Fault(
        TAPS, "      wgmma_wait<decltype(pending)::value>();\n", ""
    ),
    "taps: y stored before it ends": Fault(
        TAPS, "    wgmma_wait<0>();\n    if (S::Overlaps)", "    if (S::Overlaps)"
    ),
    "taps: a tap meets what is beside the image": Fault(
        TAPS_LOAD, "meets(w, p.i + tap.x, p.j + tap.y)", "meets(w, p.i + tap.x, p.j)"
    ),
    "taps: a step reads the pixels of the one before": Fault(
        TAPS, "s.rows[min(step, count - 1) * kPixels", "s.rows[max(0, min(step, count) - 1) * kPixels"
    ),
    "taps: weights kept that another tile of filters needs": Fault(
        TAPS_SHARED, "  if (l.groups * l.tiles_out > 1) return 0;\n", ""
    ),
    "taps: what is left over added to a bundle's own": Fault(
        "stripe_kernels/backends/cuda_taps.py", "2 * bundle + (place // SIXTEEN == bundles)", "2 * bundle"
    ),
    "wgrad: x and dy not awaited": Fault(WGRAD, "      mbarrier_wait(s.ready, ring.parity);\n", ""),
    "wgrad: a stage overwritten while it is read": Fault(WGRAD_LOAD, "mbarrier_wait(s.read, ring.parity ^ 1);", ";"),
    "wgrad: a stage given back while it is read": Fault(
        WGRAD, "    wgmma_wait<0>();\n    if (kLast && leader)", "    if (kLast && leader)"
    ),
    "wgrad: registers filled while wgmma reads them": Fault(
        WGRAD, "kGathered * 2), near, far, next);", "kGathered * 2), near, far, current);"
    ),
    "wgrad: a warpgroup without stripes awaited": Fault(
        WGRAD, "mbarrier_init(s.read, 4 * groups);", "mbarrier_init(s.read, 4 * kGroups);"
    ),
    "wgrad: x's bytes not announced": Fault(
        WGRAD_LOAD, "mbarrier_expect(s.ready, S::Pixels * S::N * 2 + ", "mbarrier_expect(s.ready, "
    ),
    "wgrad: a tap meets what is beside the image": Fault(
        WGRAD_LOAD, "meets(w, i - tap.i, j - tap.j)", "meets(w, i - tap.i, j)"
    ),
    "wgrad: pixels that do not exist meet dy": Fault(WGRAD_LOAD, "p.n < w.images ? p.i : -(1 << 30)", "p.i"),
    "wgrad: neighbours in each other's place": Fault(
        WGRAD_LOAD, "first(l.walk, tile, phase, 2 * pair), second(l.walk, tile, phase, 2 * pair + 1)",
        "second(l.walk, tile, phase, 2 * pair), first(l.walk, tile, phase, 2 * pair + 1)",
    ),
    "wgrad: no zeros behind the patch": Fault(
        WGRAD, "kRowBytes + i % 64 * 16) = {0, 0, 0, 0};", "kRowBytes + i % 64 * 16);"
    ),
    "wgrad: one chunk of filters for all": Fault(WGRAD_MULTIPLY, "{chunk << 16 | chunk,", "{0,"),
    "wgrad: a share without its last tile": Fault(
        WGRAD_SHARED, "end = begin + each + (split < more);", "end = begin + each - 1 + (split < more);"
    ),
    "wgrad: a stripe gathered through another tap": Fault(
        "stripe_kernels/backends/cuda_wgrad.py", "np.stack([at, block.taps, ", "np.stack([at, block.taps[::-1], "
    ),
    "whole: x not awaited": Fault(
        WHOLE, "      if (c > 0) mbarrier_wait(s.ready + ring.stage, ring.parity);\n", ""
    ),
    "whole: a patch overwritten while it is read": Fault(
        WHOLE_LOAD, "      mbarrier_wait(s.read + ring.stage, ring.parity ^ 1);\n", ""
    ),
    "whole: a patch given back before it is there": Fault(
        WHOLE, "        mbarrier_wait(s.ready + ring.stage, ring.parity);\n        release", "        release"
    ),
    "whole: weights not awaited": Fault(WHOLE, "        if (waits) mbarrier_wait(s.kept + tap, 0);\n", ""),
    "whole: y stored before it ends": Fault(
        WHOLE, "    wgmma_wait<0>();\n    wgmma_keep(y[0]);\n", "    wgmma_keep(y[0]);\n"
    ),
    "whole: a turn that is not given on": Fault(
        WHOLE, "if (tap + 1 == taps && c + 1 == chunks) pass();", ""
    ),
    "whole: the next row's first positions stored": Fault(
        WHOLE_STORE, "across < w.tile_w && tile.column", "tile.column"
    ),
    "whole: a tap reads beside its own": Fault(
        "stripe_kernels/backends/cuda_whole.py", "+ tap.j - origin[1])", "+ max(0, tap.j - origin[1] - 1))"
    ),
}  # fmt: skip


def check(extension: str, part: str) -> None:
    """The problems of a part ("fprop", "dgrad", "taps", "wgrad", "whole", "stripes") or of all ("all"), in every order;
    AssertionError at the first that shows a fault."""
    import torch

    from stripe_kernels.backends import cuda_stripe_gemm
    from stripe_kernels.backends.cuda_gather import CONFIGS as DGRAD_CONFIGS
    from stripe_kernels.backends.cuda_taps import CONFIGS as TAPS_CONFIGS
    from stripe_kernels.backends.cuda_wgmma import CONFIGS
    from stripe_kernels.backends.cuda_whole import CONFIGS as WHOLE_CONFIGS
    from stripe_kernels.registry import PASSES
    from tests.cuda.problems import problem_of
    from tests.cuda.test_gather import EVERYTHING as GATHERED
    from tests.cuda.test_gather import check_dgrad
    from tests.cuda.test_mma import WIDE
    from tests.cuda.test_stripe_gemm import PROBLEMS as STRIPES_PROBLEMS
    from tests.cuda.test_stripe_gemm import check_stripes
    from tests.cuda.test_taps import EVERYTHING as TAPPED
    from tests.cuda.test_taps import PROBLEMS as TAPS_PROBLEMS
    from tests.cuda.test_taps import check_fprop
    from tests.cuda.test_wgmma import (
        BUNDLES,
        DEEP,
        EVERYTHING,
        MANY,
        MMA_PROBLEMS,
        PHASES_IN_FULL_BLOCKS,
        check_wgmma,
        refused,
    )
    from tests.cuda.test_wgrad import EVERYTHING as SUMMED
    from tests.cuda.test_wgrad import PROBLEMS as WGRAD_PROBLEMS
    from tests.cuda.test_wgrad import SHAPES, check_wgrad, fitting
    from tests.cuda.test_whole import EVERYTHING as WHOLE_EVERYTHING
    from tests.cuda.test_whole import FEW, ROUND, check_whole
    from tests.cuda.test_whole import PROBLEMS as WHOLE_PROBLEMS

    native = emulated.load(Path(extension))
    few = (c for c in MMA_PROBLEMS if c.name in ("lopsided", "grouped", "strided"))
    cases = (
        (*few, DEEP, EVERYTHING, BUNDLES, MANY, *PHASES_IN_FULL_BLOCKS) if part in ("all", "fprop") else ()
    )
    for c, config in product(cases, CONFIGS[:2]):
        if refused(problem_of(c, "channels_last", torch.bfloat16), config):
            continue
        first = check_wgmma(native, c, torch.bfloat16, config)
        with emulated.late(native):
            assert torch.equal(check_wgmma(native, c, torch.bfloat16, config), first), (
                "late copies change the bits"
            )
        with emulated.backwards(native):
            again = check_wgmma(native, c, torch.bfloat16, config)
            assert torch.equal(again, first), "the order of threads changes the bits"
            with emulated.late(native):  # the newest copies arrive first
                last = check_wgmma(native, c, torch.bfloat16, config)
                assert torch.equal(last, first), "the order of copies changes the bits"
            with emulated.greedy(native):  # the second warpgroup gets ahead
                last = check_wgmma(native, c, torch.bfloat16, config)
                assert torch.equal(last, first), "a warpgroup that gets ahead changes the bits"
    cases = (*(c for c in WIDE if c.name in ("lopsided", "grouped", "strided")), GATHERED)
    for c, config in product(cases if part in ("all", "dgrad") else (), DGRAD_CONFIGS[1:]):
        first = check_dgrad(native, c, torch.bfloat16, config)
        for order in (emulated.late, emulated.backwards, emulated.greedy):
            with order(native):
                assert torch.equal(check_dgrad(native, c, torch.bfloat16, config), first), (
                    f"{order.__name__}: other bits"
                )
    cases = (
        *(c for c in TAPS_PROBLEMS if c.name in ("groups of whole chunks", "taps far apart", "full")),
        TAPPED,
    )
    for c, config in product(cases if part in ("all", "taps") else (), TAPS_CONFIGS):
        first = check_fprop(native, c, torch.bfloat16, config)
        for order in (emulated.late, emulated.backwards, emulated.greedy):
            with order(native):
                assert torch.equal(check_fprop(native, c, torch.bfloat16, config), first), (
                    f"{order.__name__}: other bits"
                )
    cases = (
        *(c for c in WGRAD_PROBLEMS if c.name in ("three groups", "five by four", "one image of many tiles")),
        SUMMED,
    )
    for c, shape in product(cases if part in ("all", "wgrad") else (), SHAPES[:3]):
        config = fitting(c, shape, 1 if c is cases[2] else 2)
        if config is None:
            continue
        first = check_wgrad(native, c, torch.bfloat16, config)
        for order in (emulated.late, emulated.backwards, emulated.greedy):
            with order(native):
                assert torch.equal(check_wgrad(native, c, torch.bfloat16, config), first), (
                    f"{order.__name__}: other bits"
                )
    for c, which in product(STRIPES_PROBLEMS if part in ("all", "stripes") else (), PASSES):
        if cuda_stripe_gemm.refuse(problem_of(c, "channels_last", torch.bfloat16), which) is None:
            check_stripes(native, c, which, torch.bfloat16)
    named = (c for c in WHOLE_PROBLEMS if c.name in ("several blocks", "full", "no padding"))
    cases = (*named, WHOLE_EVERYTHING, FEW, ROUND)
    for c in cases if part in ("all", "whole") else ():
        first = check_whole(native, c, torch.bfloat16, WHOLE_CONFIGS[0])
        for order in (emulated.late, emulated.backwards, emulated.greedy):
            with order(native):
                assert torch.equal(check_whole(native, c, torch.bfloat16, WHOLE_CONFIGS[0]), first), (
                    f"{order.__name__}: other bits"
                )


class Builder:
    """Objects of the sound sources, compiled once; only the kernels of a fault are compiled again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = [
            *emulated.device_sources(),
            ROOT / "csrc/bindings/cuda.cpp",
            emulated.EMULATE / "switch.cpp",
        ]
        for source in self.sources:
            self._compile(ROOT, source.relative_to(ROOT), folder)

    @staticmethod
    def _compile(tree: Path, source: Path, folder: Path) -> None:
        options = emulated.options(tree)
        command = [
            *emulated.CXX.split(),
            "-x",
            "c++",
            "-c",
            *options,
            str(tree / source),
            "-o",
            str(folder / f"{source.name}.o"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr)

    def link(self, tree: Path, changed: str = "") -> Path:
        """The extension with the kernels that a changed file is part of compiled anew, from the tree."""
        own = (KERNEL, DGRAD, TAPS, WGRAD, WHOLE, SUM, SPREAD)
        sources = {file: (file,) for file in own} | {TILES: (TAPS, DGRAD, WGRAD)}
        kernel = PARTS.get(Path(changed).parent.name)
        anew = (kernel,) if kernel else sources.get(changed, own[:5])
        anew = anew if changed.startswith("csrc") else ()
        target, objects = tree / "_cuda.so", []
        for source in self.sources:
            name = str(source.relative_to(ROOT))
            folder = tree if name in anew else self.folder
            if name in anew:
                self._compile(tree, Path(name), folder)
            objects.append(str(folder / f"{source.name}.o"))
        subprocess.run([*emulated.CXX.split(), "-shared", *objects, "-o", str(target)], check=True)
        return target


def part_of(fault: str) -> str:
    """Whose problems show it: those of the kernel it is named after, fprop's where it is named after none."""
    kernel = fault.partition(":")[0]
    return kernel if kernel in ("dgrad", "taps", "stripes", "wgrad", "whole") else "fprop"


def verdict(tree: Path, extension: Path, part: str) -> str | None:
    """What noticed a fault; None when nothing did."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.cuda.mutate", "--check", str(extension), "--part", part]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith(("emulate:", "AssertionError"))]
    return lines[-1][:200] if lines else f"exit status {done.returncode}"


def merge(path: Path, caught: dict[str, str | None], sources: str) -> None:
    """Into the record: what was planted now over what was before, in the order of FAULTS, those alone."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {name: {"noticed by": text, "sources": sources} for name, text in caught.items()}
    kept = {name: record[name] for name in FAULTS if name in record}
    path.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", nargs="*", choices=[[], *FAULTS], help="all without a name")
    parser.add_argument("--record", type=Path, help="merge what noticed each fault into this JSON")
    parser.add_argument("--check", metavar="SO", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="all", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check, arguments.part)
        return 0
    from bench.gpu_check.record import source_hash  # the copy has no bench

    caught: dict[str, str | None] = {}
    sources = source_hash()
    with tempfile.TemporaryDirectory() as temporary:
        builder, tree = Builder(Path(temporary)), Path(temporary) / "tree"
        for part in ("csrc", "stripe_kernels", "python", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        sound = verdict(tree, builder.link(tree), "all")
        if sound:
            sys.exit(f"without a fault: {sound}")
        for name in arguments.fault or FAULTS:
            fault = FAULTS[name]
            path = tree / fault.file
            text = path.read_text()
            if text.count(fault.right) != 1:
                sys.exit(f"{fault.file} no longer has what {name!r} replaces once: {fault.right!r}")
            path.write_text(text.replace(fault.right, fault.wrong))
            caught[name] = verdict(tree, builder.link(tree, fault.file), part_of(name))
            path.write_text(text)
            print(f"{name:40s} {caught[name] or 'NOT NOTICED'}", flush=True)
    if arguments.record:
        merge(arguments.record, caught, sources)
    return 0 if all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
