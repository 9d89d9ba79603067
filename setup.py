"""Builds the native extensions: one ninja graph, no torch.

    stripe_kernels._cpu    csrc/cpu/*.cpp, csrc/bindings/cpu.cpp     once, for the baseline CPU
                           csrc/cpu/isa/*.cpp                        once per instruction set, -DSK_ISA=<name>
    stripe_kernels._cuda   csrc/cuda/*.cu, csrc/bindings/cuda.cpp    nvcc

`_cuda` is built wherever nvcc is found, GPU or not, and is optional: when nvcc fails its message is printed
and the install goes on without it. CXX and NVCC name other compilers, as in make; an empty NVCC builds for the
CPU alone. Everything else about the project is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

if (
    int(setuptools.__version__.split(".")[0]) < 77
):  # it would stumble over pyproject.toml's licence expression
    sys.exit(f"stripe_kernels: building needs setuptools >= 77, this is {setuptools.__version__}")

CSRC = Path("csrc")
NATIVE = Path("build") / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC's own headers pass undefined vectors to intrinsics that ignore them.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-uninitialized", *AVX2]
X86_ISAS = {
    "amx": ["-mamx-tile", "-mamx-bf16", *AVX512],
    "avx512bf16": ["-mavx512bf16", *AVX512],
    "avx512": AVX512,
    "avx2": AVX2,
    "generic": [],
}
ARM_ISAS = {"neon": [], "generic": []}  # NEON is part of the aarch64 baseline
ISAS = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}

# -ffp-contract=fast fuses multiply-adds where the target can. No -ffast-math: NaN and Inf keep their meaning.
CXXFLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-Wno-maybe-uninitialized"),
]
NVCCFLAGS = [
    "-O3",
    "-std=c++17",
    "--threads=0",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
]

# Machine code where a chip has kernels of its own, PTX for the rest. Never PTX of 90a: no other chip runs it. Files
# named *_sm90.cu are written in its instructions and compiled for it alone.
CUDA_TARGETS = [
    ("compute_80", "sm_80"),
    ("compute_80", "compute_80"),
    ("compute_90a", "sm_90a"),
    ("compute_90", "compute_90"),
    ("compute_100", "sm_100"),
]


def find_nvcc() -> str | None:
    """NVCC of the environment, nvcc on PATH, or where CUDA's installer leaves it without telling PATH."""
    if "NVCC" in os.environ:
        return os.environ["NVCC"] or None
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def isas(machine: str, cxx: str) -> dict[str, list[str]]:
    """Instruction sets the kernels are compiled for: name -> compiler flags."""
    known = ISAS.get(machine, {"generic": []})
    return {name: flags for name, flags in known.items() if name != "amx" or knows_amx(cxx)}


@cache
def knows_amx(cxx: str) -> bool:
    """Compilers of before 2021 know the other sets; that their assembler knows this one is asked too."""
    command = [*shlex.split(cxx), *X86_ISAS["amx"], "-x", "c++", "-", "-c", "-o", os.devnull]
    source = 'void f() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def sources(pattern: str) -> list[Path]:
    return sorted(CSRC.glob(pattern))


def include(*directories: str | Path) -> list[str]:
    return [f"-I{directory}" for directory in directories]


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaGraph:
    """Build statements, collected first, then written into `folder` and run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5", f"builddir = {ninja_path(folder)}"]

    def rule(self, name: str, command: str, **variables: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def compile(self, rule: str, source: Path, flags: Iterable[str], suffix: str = "") -> Path:
        """Returns the object of `source`, named after its place in the project and `suffix`."""
        target = self.folder / "obj" / source.with_name(source.name + suffix + ".o")
        self.build(target, rule, [source], flags)
        return target

    def build(self, target: Path, rule: str, inputs: Iterable[Path], flags: Iterable[str]) -> None:
        self.lines.append(f"build {ninja_path(target)}: {rule} {' '.join(map(ninja_path, inputs))}")
        self.lines.append(f"  flags = {' '.join(shlex.quote(f).replace('$', '$$') for f in flags)}")

    def run(self, *arguments: str | Path) -> bool:
        """True when every requested target is up to date afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR) / "ninja")
        except ImportError:
            ninja = shutil.which("ninja") or sys.exit("stripe_kernels: ninja not found; pip install ninja")
        command = [ninja, "-f", self.folder / "build.ninja", *arguments]
        return subprocess.run(command, check=False).returncode == 0


def have_flags(machine: str, cxx: str) -> list[str]:
    """What the code above the kernels needs to know to choose among them at run time."""
    return [f"-DSK_HAVE_{name.upper()}" for name in isas(machine, cxx)]


def add_cpu_objects(graph: NinjaGraph, cxx: str, machine: str, flags: list[str]) -> list[Path]:
    graph.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
    objects = [graph.compile("cxx", path, flags + have_flags(machine, cxx)) for path in sources("cpu/*.cpp")]
    for name, isa_flags in isas(machine, cxx).items():
        isa = [f"-DSK_ISA={name}", *isa_flags]
        objects += [graph.compile("cxx", path, flags + isa, f".{name}") for path in sources("cpu/isa/*.cpp")]
    return objects


def add_cpu(graph: NinjaGraph, output: Path, cxx: str) -> None:
    import pybind11

    machine, flags = platform.machine(), CXXFLAGS + include(CSRC)
    objects = add_cpu_objects(graph, cxx, machine, flags)
    flags = flags + have_flags(machine, cxx) + include(pybind11.get_include(), sysconfig.get_path("include"))
    objects.append(graph.compile("cxx", CSRC / "bindings/cpu.cpp", flags))
    graph.rule("link", f"{cxx} -shared $in -o $out $flags")
    graph.build(output, "link", objects, ["-fopenmp"])


def add_cuda(graph: NinjaGraph, output: Path, nvcc: str) -> None:
    import pybind11

    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = listing.stdout.split()
    targets = [
        f"-gencode=arch={arch},code={code}"
        for arch, code in CUDA_TARGETS
        if code.replace("compute_", "sm_").rstrip("a") in known  # sm_100 needs nvcc 12.8
    ]
    command = f"{shlex.quote(nvcc)} -MMD -MF $out.d $flags -c $in -o $out"
    graph.rule("nvcc", command, depfile="$out.d", deps="gcc")
    graph.rule("nvlink", f"{shlex.quote(nvcc)} -shared -cudart=static $in -o $out $flags")
    flags = NVCCFLAGS + include(CSRC)
    hopper = [target for target in targets if target.endswith("sm_90a")]
    objects = [
        graph.compile("nvcc", source, flags + (hopper if source.stem.endswith("_sm90") else targets))
        for source in sources("cuda/*.cu")
    ]
    # nvcc, not the host compiler: only it knows where cuda_runtime.h is (what PATH names may be a wrapper).
    python = include(pybind11.get_include(), sysconfig.get_path("include"))
    objects.append(graph.compile("nvcc", CSRC / "bindings/cuda.cpp", flags + python))
    graph.build(output, "nvlink", objects, [])


class BuildWithNinja(build_ext):
    """Hands both extensions to one ninja run: their objects compile side by side, and only when stale."""

    def build_extensions(self) -> None:
        outputs = {ext.name: NATIVE / Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        cpu, cuda = outputs["stripe_kernels._cpu"], outputs.get("stripe_kernels._cuda")
        graph = NinjaGraph(NATIVE)
        add_cpu(graph, cpu, os.environ.get("CXX", "c++"))
        if cuda:
            add_cuda(graph, cuda, find_nvcc())

        jobs = f"-j{self.parallel or len(os.sched_getaffinity(0))}"
        if not graph.run(jobs, "-k0", *outputs.values()):
            if not graph.run(jobs, cpu):
                sys.exit("stripe_kernels: building the CPU extension failed; the compiler's message is above")
            self.extensions = [ext for ext in self.extensions if not ext.optional]
            self.remove_stale("stripe_kernels._cuda")
            print("stripe_kernels: nvcc failed, see above; going on WITHOUT the CUDA extension _cuda")
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(outputs[ext.name], target)

    def remove_stale(self, name: str) -> None:
        """An extension that no longer builds must not stay behind from an earlier build."""
        for path in (Path(self.get_ext_fullpath(name)), Path(self.get_ext_filename(name))):
            path.unlink(missing_ok=True)


class SelfTest(Command):
    """The CPU kernels and tests/native as one program, for other machines and with other flags too."""

    description = "compile the CPU kernels' own test program"
    user_options: ClassVar = [
        ("machine=", None, "what to compile for, as `uname -m` prints it"),
        ("cxx=", None, "compiler"),
        ("flags=", None, "flags added for compiling and linking"),
        ("output=", None, "the program's path; the objects go beside it"),
    ]

    def initialize_options(self) -> None:
        self.machine, self.cxx = platform.machine(), os.environ.get("CXX", "c++")
        self.flags, self.output = "", str(NATIVE / "selftest" / "selftest")

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        output, tests = Path(self.output), Path("tests/native")
        graph = NinjaGraph(output.parent)
        flags = CXXFLAGS + include(CSRC) + shlex.split(self.flags)
        objects = add_cpu_objects(graph, self.cxx, self.machine, flags)
        objects += [graph.compile("cxx", path, flags) for path in sorted(tests.glob("*.cpp"))]
        graph.rule("link", f"{self.cxx} $in -o $out $flags")
        graph.build(output, "link", objects, ["-fopenmp", *shlex.split(self.flags)])
        if not graph.run(output):
            sys.exit("stripe_kernels: building the self-test failed; the compiler's message is above")


def extensions() -> list[Extension]:
    cuda = CSRC / "bindings/cuda.cpp"
    files = {"_cpu": [*sources("cpu/**/*.cpp"), CSRC / "bindings/cpu.cpp"]}
    if cuda.exists() and find_nvcc():
        files["_cuda"] = [*sources("cuda/*.cu"), cuda]
    return [
        Extension(f"stripe_kernels.{name}", [str(path) for path in paths], optional=name == "_cuda")
        for name, paths in files.items()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWithNinja, "selftest": SelfTest})
