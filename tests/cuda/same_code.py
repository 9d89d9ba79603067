"""Which kernels have other machine code than at a commit: what a change of names, comments or files has to show.

    python -m tests.cuda.same_code COMMIT [FILE ...]

Every kernel of csrc/cuda, of the commit and of the working tree, is compiled for sm_80, sm_90a and sm_100. The same are
those whose instructions, as the chip reads them, constants, registers, and local and shared memory are; a kernel under
another name is found by them. The exit status is 1 where one differs. Needs nvcc, and no GPU.
"""

from __future__ import annotations

import argparse
import io
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cuda import emulated
from tests.cuda.test_machine_code import NVCC, architectures_of_nvcc

Code = dict[str, bytes]  # what the chip is given of a kernel, by the kernel's name
_NAMESPACE = re.compile(r"(\d+)_GLOBAL__N_")
_OF_KERNEL = re.compile(r"\.(text|nv\.constant\d+|nv\.shared|nv\.local)\.(.+)")
_WITHOUT_BYTES = 8  # SHT_NOBITS: shared and local memory, of which a file has the sizes alone


def sections(cubin: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Of a 64-bit ELF file: name, sh_info and contents (the size where a file has none)."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    headers = [struct.unpack_from("<IIQQQQII", cubin, start + i * size) for i in range(count)]
    text = headers[names][4]
    for name, kind, _, _, offset, length, _, info in headers:
        end = cubin.index(b"\0", text + name)
        contents = cubin[offset : offset + length] if kind != _WITHOUT_BYTES else str(length).encode()
        yield cubin[text + name : end].decode(), info, contents


def readable(name: str) -> str:
    """A mangled name without the anonymous namespace, whose own holds a hash of the file."""
    found = _NAMESPACE.search(name)
    if not found:
        return name
    return name[: found.start()] + name[found.end(1) + int(found[1]) :]


def code_of(cubin: bytes) -> Code:
    """What each kernel consists of. The upper byte of a text section's sh_info is the number of registers."""
    parts: dict[str, list[bytes]] = {}
    for section, info, contents in sections(cubin):
        found = _OF_KERNEL.fullmatch(section)
        if found:
            registers = info >> 24 if found[1] == "text" else 0
            parts.setdefault(readable(found[2]), []).append(
                b"%s %d " % (found[1].encode(), registers) + contents
            )
    kernels = {name: b"\n".join(sorted(part)) for name, part in parts.items()}
    return {name: code for name, code in kernels.items() if b"text " in code}


def compile_for(source: Path, architecture: str) -> Code:
    """Of a source in the csrc/cuda of some tree."""
    options = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{source.parents[1]}", "-cubin"]
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [NVCC, *options, target, source, "-o", cubin]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{source}: {result.stderr}")
        return code_of(cubin.read_bytes())


def export(commit: str, folder: Path) -> Path:
    """The commit's csrc, below the folder."""
    command = ["git", "archive", commit, "csrc"]
    result = subprocess.run(command, cwd=emulated.ROOT, capture_output=True, check=False)
    if result.returncode:
        sys.exit(result.stderr.decode())
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def differences(before: Code, after: Code) -> list[str]:
    """What is not the same; empty where the chip cannot tell. Kernels without a namesake are matched by their code."""
    found = [f"{name} differs" for name in before.keys() & after.keys() if before[name] != after[name]]
    left = [code for name, code in after.items() if name not in before]
    for name in before.keys() - after.keys():
        if before[name] in left:
            left.remove(before[name])
        else:
            found.append(f"{name} is gone, or differs under another name")
    return sorted(found) + [f"a kernel of {len(code)} bytes is new" for code in left]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("file", nargs="*", help="of csrc/cuda, without .cu; all without a name")
    arguments = parser.parse_args()
    if NVCC is None:
        sys.exit("nvcc is not installed")
    same = True
    with tempfile.TemporaryDirectory() as temporary:
        old = export(arguments.commit, Path(temporary))
        here = {p.stem for p in emulated.device_sources()}
        there = {p.stem for p in (old / "csrc/cuda").glob("*.cu")}
        for stem in arguments.file or sorted(here | there):
            for architecture in architectures_of_nvcc():
                if stem.endswith("_sm90") and architecture != "sm_90a":
                    continue
                before, after = (
                    compile_for(root / f"csrc/cuda/{stem}.cu", architecture) if stem in stems else {}
                    for root, stems in ((old, there), (emulated.ROOT, here))
                )
                found = differences(before, after)
                same = same and not found
                verdict = "; ".join(found) or f"{len(after)} kernels, the same code"
                print(f"{stem} for {architecture}: {verdict}", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
