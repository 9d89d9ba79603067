"""The native code under a checker, in a copy of the tree below build/sanitized: the tree itself stays as it is.

python -m tests.sanitized address    (make asan)   extension and self-test: address and undefined behaviour
python -m tests.sanitized thread     (make tsan)   self-test, whose teams are pthreads then (csrc/cpu/parallel.cpp)
python -m tests.sanitized valgrind   (make valgrind)   self-test without AVX-512, which valgrind does not know
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tree import CXX, ROOT

ADDRESS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# The tests that put the extension's boundary, layouts, threads and numbers to work, and problems drawn at random.
TESTS = (
    "tests/test_malformed.py",
    "tests/test_threads.py",
    "tests/test_numbers.py",
    "tests/test_epilogue.py",
)
SELECT = "cpu_ and not forked and not gil and not DataLoader"
# Training steps and whole networks in one native call, and what these refuse: CallList, LaneNetwork.
NETWORKS = (
    "tests/test_boundary.py",
    "tests/test_front_training.py",
    "tests/compile/test_program.py",
    "tests/compile/test_resident.py",
    "tests/compile/test_front.py",
)
PROBLEMS = ("-m", "tests.generate", "--count", "500", "--seed", "77")


def copy(name: str) -> Path:
    """The tree's sources below build/sanitized; what did not change keeps its time, so builds are incremental."""
    target = ROOT / "build/sanitized" / name
    for part in (
        "csrc",
        "tests",
        "stripe_kernels",
        "python",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        for source in [ROOT / part] if (ROOT / part).is_file() else sorted((ROOT / part).rglob("*")):
            to = target / source.relative_to(ROOT)
            stale = not to.exists() or to.stat().st_mtime != source.stat().st_mtime
            if source.is_file() and source.suffix not in (".so", ".pyc") and stale:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, to)
    return target


def call(folder: Path, *command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=folder, env={**os.environ, **environment}, check=True)


def library(name: str) -> str:
    command = [*CXX.split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def selftest(folder: Path, flags: str) -> Path:
    program = folder / "build/selftest/selftest"
    call(folder, sys.executable, "setup.py", "-q", "selftest", f"--output={program}", f"--flags={flags}")
    return program


def address() -> None:
    folder = copy("address")
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    call(folder, selftest(folder, ADDRESS), **options)
    call(folder, sys.executable, "setup.py", "-q", "build_ext", "--inplace", CXX=f"{CXX} {ADDRESS}", NVCC="")
    # The runtimes come before Python's own allocations, and libstdc++ before they look for its __cxa_throw.
    options["LD_PRELOAD"] = " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so")))
    options["OMP_NUM_THREADS"] = "1"
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")
    call(folder, *pytest, "-k", SELECT, *TESTS, **options)
    call(folder, *pytest, *NETWORKS, **options)
    call(folder, sys.executable, *PROBLEMS, **options)


def thread() -> None:
    folder = copy("thread")
    call(folder, selftest(folder, "-O1 -g1 -fsanitize=thread"), TSAN_OPTIONS="halt_on_error=1")


def valgrind() -> None:
    folder = copy("valgrind")
    program = selftest(folder, "-O1 -g1")
    options = ("--error-exitcode=1", "--leak-check=full", "--errors-for-leak-kinds=definite", "-q")
    call(folder, "valgrind", *options, program, "generic", "avx2", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    {"address": address, "thread": thread, "valgrind": valgrind}[sys.argv[1]]()
