"""Plants one fault of each class in a copy of the tree, builds there, and shows which test notices.

    python -m tests.mutate [FAULT ...] [--record tests/records/mutations.json]      (make mutate)

The copy takes the objects below build/ along, so that only what a fault touches is compiled again. Without the fault
the same tests have to pass in the copy; with it one of them has to fail.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

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


PYTEST = ("-m", "pytest", "-q", "-x", "-n", "0", "--no-header", "-p", "no:cacheprovider")
FAULTS = {
    "off by one in a border tap": Fault(
        "csrc/cpu/wgrad.cpp",
        "floor_div(s.W - 1 - off_w, s.stride_w) + 1}",
        "floor_div(s.W - 1 - off_w, s.stride_w)}",
        (*PYTEST, "tests/test_wgrad.py", "tests/test_generated.py"),
    ),
    "race in a shared accumulation": Fault(
        "csrc/cpu/wgrad.cpp",
        "      team.barrier();\n    }\n    if (whole) return;",
        "    }\n    if (whole) return;",
        ("-m", "tests.sanitized", "thread"),
    ),
    "wrong permutation": Fault(
        "stripe_kernels/packed.py",
        "order = np.lexsort((k, tap, group))",
        "order = np.argsort(np.lexsort((k, tap, group)))",
        (*PYTEST, "tests/test_packed.py", "tests/test_fprop.py"),
    ),
    "stale cache": Fault(
        "stripe_kernels/snapshots.py",
        "self.version == weight._version and ",
        "",
        (*PYTEST, "tests/test_snapshots.py"),
    ),
    "unchecked index": Fault(
        "csrc/bindings/cpu.cpp",
        'require(row[j] >= 0 && row[j] < static_cast<int>(a) && !seen[row[j]], "rows are a permutation");',
        "",
        (*PYTEST, "tests/test_malformed.py", "-k", "corrupt"),
    ),
}


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


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
    caught: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, ignore=IGNORED)
        build(folder)
        for name in arguments.fault or FAULTS:
            fault = FAULTS[name]
            path = folder / fault.file
            sound = path.read_text()
            if sound.count(fault.right) != 1:
                sys.exit(f"{fault.file} no longer has what {name!r} replaces: {fault.right!r}")
            before = python(folder, *fault.tests)
            if before.returncode:
                sys.exit(f"without a fault: {before.stdout}{before.stderr}")
            path.write_text(sound.replace(fault.right, fault.wrong))
            build(folder)
            after = python(folder, *fault.tests)
            said = noticed(after.stdout + after.stderr)
            caught[name] = said or f"exit status {after.returncode}" if after.returncode else None
            print(f"{name:32s} {fault.file:32s} {caught[name] or 'NOT NOTICED'}", flush=True)
            path.write_text(sound)
            build(folder)
        if arguments.record:
            arguments.record.write_text(json.dumps(caught, indent=1) + "\n")
    return 0 if all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
