"""Every kernel compiled for every architecture: no spills, bounded registers, the right instructions."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from tests.cuda import emulated
from tests.tree import ROOT, needs_sources

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
KERNELS = sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem != "runtime")

# Registers of a thread as nvcc 13.0 gives them, of the instance of most, and by a template's width where that makes the
# difference: sm_80, sm_90a, sm_100. Of sm_90's own kernels it is what a block's threads may begin with, 65536 shared
# out; they trade registers then, and what they do not have is a spill.
REGISTERS: dict[str, dict[int, tuple[int, ...]]] = {
    "fprop_ffma": {0: (126, 128, 128)},
    "dgrad_ffma": {0: (125, 126, 122)},
    "wgrad_ffma": {0: (123, 123, 128)},
    "fprop_mma": {8: (114, 148, 162), 16: (178, 212, 226)},
    "dgrad_mma": {2: (142, 148, 152), 4: (205, 213, 222)},
    "wgrad_mma": {2: (158, 168, 174), 4: (220, 234, 230)},
    "fprop_sm90": {0: (0, 168)},
    "fprop_taps_sm90": {0: (0, 128)},
    "fprop_whole_sm90": {0: (0, 128)},
    "dgrad_sm90": {0: (0, 168)},
    "wgrad_sm90": {0: (0, 128)},
    "stripe_sum": {0: (72, 72, 80)},
    "stripe_spread": {0: (48, 48, 46)},
    "reduce": {0: (32, 32, 32)},
    "rows": {0: (30, 28, 32)},
}
MARGIN = 8  # registers: a processor hands them out to warps by as many a thread
# Threads of a block, and blocks that a multiprocessor is to hold: by their registers they have to fit into 65536.
BLOCKS = {
    "fprop_ffma": (128, 4),
    "dgrad_ffma": (128, 4),
    "wgrad_ffma": (256, 2),
    "fprop_mma": (128, 2),
    "dgrad_mma": (128, 2),
    "wgrad_mma": (128, 2),
    "fprop_sm90": (384, 1),
    "dgrad_sm90": (384, 1),
    **dict.fromkeys(("fprop_taps_sm90", "fprop_whole_sm90", "wgrad_sm90"), (512, 1)),
    "stripe_sum": (128, 6),
    "stripe_spread": (256, 4),
    "reduce": (256, 8),
    "rows": (256, 8),
}
# What a kernel is for, how often it is there at least, and whether it copies to shared memory asynchronously.
INSTRUCTIONS = {
    "ffma": ("FFMA", 16),
    "mma": ("HMMA", 16),
    "sum": ("FADD", 16),
    "spread": ("LDS", 16),
    "sm90": ("HGMMA", 4),  # one wgmma is 64 rows of products: four a chunk of channels
    "reduce": ("FADD", 1),
    "rows": ("STG", 1),
}
LOADS_BY_REGISTERS = {"sum", "reduce", "rows"}


@dataclass(frozen=True)
class Function:
    """What the assembler reports of one kernel, and which instructions it consists of."""

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]


def disassembler() -> str | None:
    """cuobjdump from the toolkit, or the copy that triton carries."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(bundled)) if bundled else None)


def compile_for(source: Path, architecture: str) -> list[Function]:
    """Compiled once for these sources; the findings are kept under build/."""
    kernel, digest = source.stem, emulated.hash_of(str(NVCC), source.read_text())
    target = ROOT / "build/machine_code" / digest / f"{kernel}.{architecture}.json"
    with emulated.built_once(target.parent, target.stem):
        if not target.exists():
            target.write_text(
                json.dumps([asdict(f) for f in examine(source, architecture, target.with_suffix(".cubin"))])
            )
    return [Function(**f) for f in json.loads(target.read_text())]


def examine(source: Path, architecture: str, cubin: Path) -> list[Function]:
    options = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-cubin"]
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    result = subprocess.run(
        [NVCC, *options, target, str(source), "-o", str(cubin)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    assert "Performance Loss" not in result.stderr, result.stderr  # wgmma that the assembler runs one by one
    assert "(C7517)" not in result.stderr, result.stderr  # or waits for where nobody asked it to
    assembly = subprocess.run(
        [disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    cubin.unlink()
    code = {name: count_instructions(text) for name, text in split_functions(assembly)}
    found = []
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", result.stderr, re.DOTALL
    ):
        stack, stores, loads = (
            int(n)
            for n in re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", text).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", text).group(1))
        shared = re.search(r"(\d+) bytes smem", text)
        found.append(
            Function(
                name, registers, stack, stores + loads, int(shared.group(1)) if shared else 0, code[name]
            )
        )
    return found


def split_functions(assembly: str) -> list[tuple[str, str]]:
    return re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", assembly, re.DOTALL)


def count_instructions(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for opcode in re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", text, re.MULTILINE
    ):
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


def registers_of(kernel: str, mangled: str) -> tuple[int, ...]:
    """Of this instance, by architecture."""
    by_width = REGISTERS[kernel]
    if len(by_width) == 1:
        return by_width[0]
    found = re.search(r"_kernelI\w*?Li(\d+)E", mangled)
    assert found is not None, mangled
    return by_width[int(found.group(1))]


@lru_cache
def architectures_of_nvcc() -> list[str]:
    listing = subprocess.run(
        [NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [a for a in ARCHITECTURES if a.rstrip("a") in listing]


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="cuobjdump is not installed: it comes with CUDA, and with triton"
)


@needs_sources
@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code(kernel: str, architecture: str) -> None:
    if architecture not in architectures_of_nvcc():
        pytest.skip(f"this nvcc does not know {architecture}")
    family = kernel.rpartition("_")[2]
    if family == "sm90" and architecture != "sm_90a":
        pytest.skip("written in the instructions of sm_90a")
    functions = compile_for(ROOT / f"csrc/cuda/{kernel}.cu", architecture)
    assert functions, "no kernel found in the assembler's report"
    for f in functions:
        where = f"{f.name} on {architecture}"
        assert f.spills == 0, f"{where} spills {f.spills} bytes"
        assert f.stack == 0, f"{where} keeps {f.stack} bytes of arrays in local memory"
        most = registers_of(kernel, f.name)[ARCHITECTURES.index(architecture)]
        assert f.registers <= most + MARGIN, f"{where} uses {f.registers} registers, {most} before"
        threads, blocks = BLOCKS[kernel]
        given = -(-f.registers // 8) * 8 * threads
        assert given * blocks <= 65536, f"{where}: {blocks} blocks of {given} registers do not fit"
        assert f.shared <= 1024, f"{where}: shared memory is dynamic, got {f.shared} bytes of its own"
        assert f.instructions.get("LDL", 0) == f.instructions.get("STL", 0) == 0, f"{where} uses local memory"
        wanted, least = INSTRUCTIONS[family]
        assert f.instructions.get(wanted, 0) >= least, f"{where} has no {wanted}: {f.instructions}"
        copies = f.instructions.get("LDGSTS", 0) + f.instructions.get("UTMALDG", 0)
        assert copies or family in LOADS_BY_REGISTERS, f"{where} does not copy asynchronously"
        if family == "sm90":
            own = {"fprop_taps_sm90": "LDSM", "wgrad_sm90": "LDS"}.get(kernel, "STSM")
            for opcode in ("UTMALDG", own, "SYNCS", "USETMAXREG"):
                assert f.instructions.get(opcode, 0), f"{where} has no {opcode}: {f.instructions}"


@needs_sources
@needs_nvcc
@needs_disassembler
def test_probes_are_what_they_time() -> None:
    """Of every probe: no local memory, and the products it is named for."""
    if "sm_90a" not in architectures_of_nvcc():
        pytest.skip("this nvcc does not know sm_90a")
    functions = compile_for(ROOT / "bench/gpu_check/probes.cu", "sm_90a")
    shapes = set()
    for f in functions:
        tiles, n, _ = map(int, re.search(r"probeILi(\d+)ELi(\d+)ELi(\d)E", f.name).groups())
        assert f.spills == f.stack == 0, f
        products = f.instructions.get("HGMMA", 0)
        assert products % (4 * tiles) == 0, f
        assert products > 0, f
        shapes.add((tiles, n))
    assert {n for _, n in shapes} >= {8, 16, 32, 64, 96, 128, 192, 256}
