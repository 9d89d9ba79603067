"""Plants one fault of each class in a copy of the tree, builds there, and shows which test notices.

    python -m tests.mutate [FAULT ... | --record tests/records/mutations.json]      (make mutate)

The copy takes the objects below build/ along, so that only what a fault touches is compiled again. Without the fault
the same tests have to pass in the copy; with it one of them has to fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stripe_kernels import _cpu
from tests.generate import sources

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "*.pyc", "__pycache__", ".*_cache", "emulated", "address", "valgrind"
)


@dataclass(frozen=True)
class Fault:
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]  # arguments of pytest, or of python -m where the first begins with "-m"
    needs: str = ""  # the instruction set that runs the code


PYTEST = ("-m", "pytest", "-q", "-x", "-n", "0", "--no-header", "-p", "no:cacheprovider")
RACES = ("-m", "tests.sanitized", "thread")


def suite(*files: str, only: str = "") -> tuple[str, ...]:
    return (*PYTEST, *(f"tests/{name}.py" for name in files), *(("-k", only) if only else ()))


MATRICES = suite("test_matrix", only="every_configuration and 0.4-2")


# "class: where": Fault
FAULTS = {
    "off by one in a border tap: wgrad": Fault(
        "csrc/cpu/wgrad.cpp",
        "floor_div(s.W - 1 - off_w, s.stride_w) + 1}",
        "floor_div(s.W - 1 - off_w, s.stride_w)}",
        suite("test_wgrad", only="pixels_generic and (lopsided or strided)"),
    ),
    "off by one in a border tap: dgrad of a stride": Fault(
        "csrc/cpu/lattice.cpp",
        "l.cols = ceil_div(s.W - w0, s.stride_w);",
        "l.cols = (s.W - w0) / s.stride_w;",
        suite("test_dgrad", only="pixels_generic and strided"),
    ),
    "off by one in a border tap: rows and columns inside the image": Fault(
        "csrc/cpu/lanes.cpp",
        "floor_div(extent - 1 - origin, step) + 1 - first}",
        "floor_div(extent - 1 - origin, step) - first}",
        suite("test_fprop", only="pixels_generic and (lopsided or strided)"),
    ),
    "off by one in a border tap: the panel of cpu_taps": Fault(
        "csrc/cpu/fprop_taps.cpp",
        "Range{std::min(r.lo, to), std::max(r.hi, to + 1)}",
        "Range{std::min(r.lo, to), std::max(r.hi, to)}",
        suite("test_taps"),
    ),
    "off by one in a border tap: zeros right of a plane's last row": Fault(
        "csrc/cpu/planes.h",
        "for (int row = row0; row < row1; ++row) at[static_cast<std::int64_t>(row) * pitch + w] = 0.f;",
        "for (int row = row0; row + 1 < row1; ++row) at[static_cast<std::int64_t>(row) * pitch + w] = 0.f;",
        suite("compile/test_program", only="bits_of_a_list or (lists_give and resnet20)"),
    ),
    "off by one in a border tap: zeros behind a plane": Fault(
        "csrc/cpu/planes.h",
        "      if (row1 == h) std::fill(at + size, at + channel_floats(), 0.f);\n",
        "",
        suite("compile/test_program", only="bits_of_a_list or (lists_give and resnet20)"),
    ),
    "off by one in a border tap: planes read in place": Fault(
        "csrc/cpu/schedule.cpp",
        "blocks_[block_kind(block)].i0 + row_min_;\n  return",
        "blocks_[block_kind(block)].i0 + row_min_ + 1;\n  return",
        suite("compile/test_program", only="bits_of_a_list or (lists_give and resnet20)"),
    ),
    "off by one in a border tap: pool of a list": Fault(
        "csrc/cpu/call_list.cpp",
        "std::min(count, (size - 1 - shift) / stride + 1);",
        "std::min(count, (size - 1 - shift) / stride);",
        suite("compile/test_program", only="max_pools"),
    ),
    "wrong permutation: squares of narrow rows": Fault(
        "csrc/cpu/isa/pool.h",
        "const vi bottom = top + half;",
        "const vi bottom = top + 1;",
        suite("compile/test_pools"),
    ),
    "off by one in a border tap: pool in lanes": Fault(
        "csrc/cpu/lane_network.cpp",
        "floor_div(x.w + s.pad_w - s.kernel_w, s.stride_w) + 1}",
        "floor_div(x.w + s.pad_w - s.kernel_w, s.stride_w) + 2}",
        suite("compile/test_resident", only="float64"),
    ),
    "off by one in a border tap: copies of x by column": Fault(
        "csrc/cpu/schedule.cpp",
        "      panel_cols_ = l.cols;\n      pitch_ = static_cast<int>",
        "      panel_cols_ = l.cols - 1;\n      pitch_ = static_cast<int>",
        MATRICES,
        "amx",
    ),
    "off by one at a border: a matrix of few filters": Fault(
        "csrc/cpu/isa/matrix.h",
        "left < most ? left : most, V};",
        "left < most ? left - 1 : most, V};",
        MATRICES,
        "amx",
    ),
    "off by one at a border: the last product's sums": Fault(
        "csrc/cpu/isa/matrix.h",
        "  add_sums(w.before);\n  asm volatile",
        "  asm volatile",
        MATRICES,
        "amx",
    ),
    "off by one at a border: the last of some pairs of vectors": Fault(
        "csrc/cpu/isa/matrix.h",
        "  if (vectors) add_product<T, 1>",
        "  if (vectors > 1) add_product<T, 1>",
        MATRICES,
        "amx",
    ),
    "race: wgrad's sums": Fault(
        "csrc/cpu/wgrad.cpp",
        "      team.barrier();\n    }\n    if (whole) return;",
        "    }\n    if (whole) return;",
        RACES,
    ),
    "race: blocks that share rows of a plane": Fault(
        "csrc/cpu/fprop.cpp",
        "const bool ordered = threads == 1 || part_count_ > 1 || schedule_.single_row_block();",
        "const bool ordered = true;",
        RACES,
    ),
    "race: a panel packed while others read it": Fault(
        "csrc/cpu/driver.h",
        "        if (task) team.barrier();\n",
        "",
        RACES,
    ),
    "race: threads of cpu_taps in one memory": Fault(
        "csrc/cpu/fprop_taps.cpp",
        "float* const panel = memory + team.thread * each;",
        "float* const panel = memory;",
        RACES,
    ),
    "race: phases read before they are split": Fault(
        "csrc/cpu/lane_network.cpp",
        "      team.barrier();\n      in = staging;",
        "      in = staging;",
        RACES,
    ),
    "race: threads share the sums of matrices": Fault(
        "csrc/cpu/fprop_matrix.cpp",
        "  MatrixWork work;\n",
        "  static MatrixWork work;\n",
        RACES,
        "amx",
    ),
    "wrong permutation: stripes of a tap": Fault(
        "stripe_kernels/packed.py",
        "order = np.lexsort((k, tap, group))",
        "order = np.argsort(np.lexsort((k, tap, group)))",
        suite("test_packed"),
    ),
    "wrong permutation: filters of a pair": Fault(
        "csrc/cpu/fprop_taps.cpp",
        "packed + s.weight + i / 2 * c * 2 + i % 2;",
        "packed + s.weight + i / 2 * c * 2 + (1 - i % 2);",
        suite("test_taps"),
    ),
    "wrong permutation: a flattened map": Fault(
        "csrc/cpu/head.cpp",
        "(c * size.h + h) * size.w, 0, 0)",
        "(h * size.c + c) * size.w, 0, 0)",
        suite("compile/test_program", only="head"),
    ),
    "wrong permutation: sums of filters in lanes": Fault(
        "csrc/cpu/fprop_filters.cpp",
        "&stripes_.filter[t->first + at * isa_.lanes];",
        "&stripes_.filter[t->first];",
        suite("test_fprop", only="filters_generic and many"),
    ),
    "wrong permutation: filters of a matrix": Fault(
        "csrc/cpu/fprop_matrix.cpp",
        "order_[t.first + f] * c",
        "order_[t.last - 1 - f] * c",
        MATRICES,
        "amx",
    ),
    "wrong permutation: steps of channels": Fault(
        "csrc/cpu/fprop_matrix.cpp",
        "(tile * steps_ + i) * height_",
        "(tile * steps_ + steps_ - 1 - i) * height_",
        MATRICES,
        "amx",
    ),
    "wrong permutation: sums of a matrix": Fault(
        "csrc/cpu/isa/matrix.h", "r.rows + first, left", "r.rows, left", MATRICES, "amx"
    ),
    "stale cache: packed weights": Fault(
        "stripe_kernels/snapshots.py",
        "self.version == weight._version and ",
        "",
        suite("test_snapshots", only="in_place and no_grad and generic"),
    ),
    "stale cache: programs after forget": Fault(
        "stripe_kernels/compile/network.py",
        "        self.unbind()\n        for module",
        "        for module",
        suite("compile/test_program", "compile/test_compact", only="elsewhere or new_weights"),
    ),
    "stale cache: plans after a measurement": Fault(
        "stripe_kernels/plan.py",
        "    _tuned[problem, which] = tuple(measured)\n    make_plan.cache_clear()\n",
        "    _tuned[problem, which] = tuple(measured)\n",
        suite("test_plan", only="measurement or measured"),
    ),
    "stale cache: runners of another number of threads": Fault(
        "stripe_kernels/stripe_op.py",
        "return t.shape, t.stride(), dtype, device, torch.get_num_threads(), tf32",
        "return t.shape, t.stride(), dtype, device, tf32",
        suite("test_threads", only="governs"),
    ),
    "stale cache: measurements of another problem": Fault(
        "stripe_kernels/compile/cache.py",
        '        "problem": choices.entry(problem, which, ()),\n',
        "",
        suite("compile/test_tune", only="key"),
    ),
    "unchecked index: rows of a weight": Fault(
        "csrc/bindings/cpu.cpp",
        'require(row[j] >= 0 && row[j] < static_cast<int>(a) && !seen[row[j]], "rows are a permutation");',
        "",
        suite("test_malformed", only="corrupt"),
    ),
    "unchecked index: tensors of a list": Fault(
        "csrc/cpu/call_list.cpp",
        "tensor < 0 || tensor >= static_cast<int>(places_.size())",
        "tensor < 0 || tensor > static_cast<int>(places_.size())",
        suite("test_boundary"),
    ),
    "memory read before it is written: zeros beside a pair": Fault(
        "csrc/cpu/fprop_taps.cpp",
        "      std::fill(panel + c * c_stride_ + zeros_, panel + (c + 1) * c_stride_, 0.f);\n",
        "      ;\n",
        # Problems of many sizes in turn: a kernel finds zeros in memory that is new, and then no test notices.
        ("-m", "tests.generate", "--kernel", "cpu_taps_generic", "--count", "60", "--seed", "3"),
    ),
    "memory read before it is written: sums of a matrix": Fault(
        "csrc/cpu/isa/matrix.h", "  (zero_matrix<I>(), ...);\n", "", MATRICES, "amx"
    ),
    "threads: calls share an arena": Fault(
        "csrc/bindings/list_function.h",
        "kept_ ? std::exchange(kept_, {}) :",
        "kept_ ? kept_ :",
        suite("compile/test_front", only="many_threads"),
    ),
    "unchecked index: inputs of a list": Fault(
        "csrc/bindings/guard.h",
        " || !inputs_[i].is(t)) return false;",
        ") return false;",
        suite("compile/test_front", only="takes_only"),
    ),
    "threads: a forked child waits for its parent's": Fault(
        "csrc/cpu/parallel.cpp",
        "at_fork != 0 || forked.load() || omp_in_parallel()",
        "omp_in_parallel()",
        suite("test_threads", only="forked_child_computes"),
    ),
    "threads: the GIL held": Fault(
        "csrc/bindings/cpu.cpp",
        '.def("run", &run_fprop<FpropTaps>, Release());',
        '.def("run", &run_fprop<FpropTaps>);',
        suite("test_threads", only="gil"),
    ),
    "threads: matrix registers kept": Fault(
        "csrc/cpu/isa/matrix.h",
        '  asm volatile("tilerelease" ::: "memory");\n',
        "",
        suite("test_selftest", only="sanitizers"),
        "amx",
    ),
    "threads: exit inside a kernel": Fault(
        "csrc/bindings/gil.h",
        "for (;;) pause();",
        "throw;",
        suite("test_interpreters", only="daemon"),
    ),
    "threads: the oldest runner gone twice": Fault(
        "stripe_kernels/stripe_op.py",
        "self._runners.pop(oldest, None)",
        "self._runners.pop(oldest)",
        suite("test_threads", only="oldest_runner"),
    ),
    "resources: no memory": Fault(
        "csrc/cpu/parallel.cpp",
        "    if (!p) throw NoMemory(bytes);\n",
        "",
        suite("test_out_of_memory", only="generic or network"),
    ),
    "resources: a cache file written in place": Fault(
        "stripe_kernels/compile/cache.py",
        '    temporary = folder / f".{name}.{secrets.token_hex(4)}"\n',
        '    temporary = folder / f"{name}.json"\n',
        suite("compile/test_tune", only="whole_files"),
    ),
    "resources: a network in the pages of its file": Fault(
        "stripe_kernels/compile/files.py",
        "file.get_tensor(n).clone()",
        "file.get_tensor(n)",
        suite("compile/test_files", only="outlives"),
    ),
}


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(folder / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "NVCC": ""}  # the CUDA half has tests/cuda/mutate.py
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(folder: Path) -> None:
    result = python(folder, "setup.py", "-q", "build_ext", "--inplace")
    if result.returncode:
        sys.exit(result.stdout + result.stderr)


def noticed(output: str) -> str | None:
    """The line that names the failing test or the sanitizer's finding."""
    found = re.search(r"^(FAILED \S+|SUMMARY: .*)", output, re.MULTILINE)
    return found.group(1) if found else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", nargs="*", choices=[[], *FAULTS], help="all without a name")
    parser.add_argument("--record", type=Path, help="write what noticed each fault here as JSON")
    arguments = parser.parse_args()
    if arguments.record and arguments.fault:
        parser.error("a record is of all faults")
    caught: dict[str, str | None] = {}
    elsewhere: list[str] = []  # what cannot run on this processor
    sound: set[tuple[str, ...]] = set()  # tests that pass without a fault
    chosen = {name: FAULTS[name] for name in arguments.fault or FAULTS}
    for name, fault in chosen.items():
        if (ROOT / fault.file).read_text().count(fault.right) != 1:
            sys.exit(f"{fault.file} no longer has once what {name!r} replaces: {fault.right!r}")
    for name, fault in list(chosen.items()):
        if fault.needs and fault.needs not in _cpu.isas():
            print(f"{name:64s} not planted: this processor has no {fault.needs}", flush=True)
            elsewhere.append(name)
            del chosen[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, ignore=IGNORED)
        build(folder)
        for fault in chosen.values():
            if fault.tests not in sound:
                before = python(folder, *fault.tests)
                if before.returncode:
                    sys.exit(f"without a fault: {before.stdout}{before.stderr}")
                sound.add(fault.tests)
        for name, fault in chosen.items():
            path = folder / fault.file
            text = path.read_text()
            path.write_text(text.replace(fault.right, fault.wrong))
            build(folder)  # the file of the fault before too, which is sound again
            after = python(folder, *fault.tests)
            said = noticed(after.stdout + after.stderr)
            caught[name] = said or f"exit status {after.returncode}" if after.returncode else None
            print(f"{name:64s} {caught[name] or 'NOT NOTICED'}", flush=True)
            path.write_text(text)
            if arguments.record:
                written = {"kernels": sources(), "noticed by": caught, "not planted": elsewhere}
                arguments.record.write_text(json.dumps(written, indent=1) + "\n")
    missed = [name for name, said in caught.items() if said is None]
    print(f"{len(caught) - len(missed)} of {len(caught)} noticed; not noticed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
