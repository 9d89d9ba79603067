"""What a build leaves behind: instruction sets kept apart, an optional CUDA half, a complete archive."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import stripe_kernels
from tests.tree import ROOT, needs_compiler, needs_sources

BUILT = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
NM = shutil.which("nm")


def isa_objects() -> list[Path]:
    return sorted((BUILT / "obj/csrc/cpu/isa").glob("*.o"))


def symbols(path: Path) -> list[tuple[str, str]]:
    """(nm's letter, mangled name) of everything `path` defines."""
    listing = subprocess.run([NM, "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in listing.splitlines()]


@pytest.mark.skipif(NM is None, reason="nm (binutils) is not installed")
@pytest.mark.skipif(not isa_objects(), reason="the extension was not built in this checkout: make build")
def test_objects_of_one_instruction_set_share_nothing_with_the_others() -> None:
    """The linker keeps one copy of a weak symbol; were it AVX-512's, a plain machine would die of SIGILL."""
    for path in isa_objects():
        isa = path.suffixes[-2].lstrip(".")
        defined = symbols(path)
        weak = [name for letter, name in defined if letter in "vVwWu"]
        assert not weak, f"{path.name} defines weak symbols: {weak}"
        exported = [name for letter, name in defined if letter.isupper()]
        assert exported, f"{path.name} exports nothing"
        assert all(isa in name for name in exported), f"{path.name} exports names without its own: {exported}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The build files around an extension of one line, in a folder of their own."""
    if any(importlib.util.find_spec(name) is None for name in ("setuptools", "pybind11", "ninja")):
        pytest.skip("building needs setuptools, pybind11 and ninja in this environment")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    sources = {
        "csrc/bindings/cpu.cpp": "extern int answer();\n"
        '#include <Python.h>\nstatic PyModuleDef def{PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};\n'
        "PyMODINIT_FUNC PyInit__cpu() { return answer() ? PyModule_Create(&def) : nullptr; }\n",
        "csrc/bindings/cuda.cpp": "\n",
        "csrc/cpu/answer.cpp": "int answer() { return 42; }\n",
        "stripe_kernels/__init__.py": "",
        "stripe_kernels/version.py": '__version__ = "1.2.3"\n',
        "python/iessp/__init__.py": "",
    }
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def build(project: Path, nvcc: str) -> subprocess.CompletedProcess[str]:
    """Runs build_ext with `nvcc`, a shell script's body, first on PATH."""
    tools = project / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (tools / "nvcc").chmod(stat.S_IRWXU)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=project,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def built(project: Path, name: str) -> bool:
    return (project / f"stripe_kernels/{name}{sysconfig.get_config_var('EXT_SUFFIX')}").exists()


@needs_sources
@needs_compiler
def test_a_failing_nvcc_costs_only_the_cuda_extension(project: Path) -> None:
    stale = project / f"stripe_kernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"from an earlier build")
    result = build(project, "echo 'nvcc: no licence today' >&2; exit 1")
    assert result.returncode == 0, result.stderr
    assert "WITHOUT the CUDA extension" in result.stdout
    assert "no licence today" in result.stdout + result.stderr
    assert built(project, "_cpu")
    assert not built(project, "_cuda")


@needs_sources
@needs_compiler
def test_a_failing_compiler_fails_the_build(project: Path) -> None:
    (project / "csrc/cpu/answer.cpp").write_text("not C++\n")
    result = build(project, "exit 1")
    assert result.returncode != 0
    assert "building the CPU extension failed" in result.stderr


@needs_sources
@needs_compiler
def test_a_second_build_compiles_nothing_and_a_changed_header_is_seen(project: Path) -> None:
    (project / "csrc/cpu/answer.h").write_text("constexpr int kAnswer = 42;\n")
    (project / "csrc/cpu/answer.cpp").write_text(
        '#include "cpu/answer.h"\nint answer() { return kAnswer; }\n'
    )
    (project / "csrc/bindings/cuda.cpp").unlink()
    assert build(project, "exit 1").returncode == 0
    assert "no work to do" in build(project, "exit 1").stdout
    (project / "csrc/cpu/answer.h").write_text("constexpr int kAnswer = 43;\n")
    assert "cpu/answer.cpp.o" in build(project, "exit 1").stdout


@needs_sources
def test_the_source_archive_holds_what_builds_and_tests_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed in this environment")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("bench", "csrc", "docs", "examples", "python", "stripe_kernels", "tests", "tools")
    built = {".pyc", ".so"}
    wanted = [
        p for name in folders for p in (ROOT / name).rglob("*") if p.is_file() and p.suffix not in built
    ]
    wanted += [p for pattern in ("*.md", "*.txt", "*.toml", "setup.py") for p in ROOT.glob(pattern)]
    missing = [name for p in wanted if (name := str(p.relative_to(ROOT))) not in held]
    assert not missing, missing


def test_the_version_stands_in_one_place() -> None:
    version = stripe_kernels.__version__
    assert importlib.metadata.version("stripe-kernels") == version
    assert f'"{version}"' not in (ROOT / "pyproject.toml").read_text()
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_the_command_line_without_its_extra_says_what_it_lacks() -> None:
    script = "import sys; sys.modules['typer'] = None; from iessp.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: the command line needs typer: install stripe-kernels with its extra, as in "
        'pip install -e ".[train]"'
    ]


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "{part}" or name.startswith("{part}."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import torch
from stripe_kernels import list_kernels, stripe_conv2d

x, weight, skeleton = torch.ones(1, 3, 5, 5), torch.ones(36, 3), torch.ones(4, 3, 3, dtype=torch.bool)
assert stripe_conv2d(x, weight, skeleton)[0, 0, 0, 0] == 27
print(*list_kernels())
try:
    stripe_conv2d(x, weight, skeleton, kernel="{kernel}")
except (RuntimeError, ValueError) as error:
    print(error)
"""


@pytest.mark.parametrize(("part", "backend"), [("stripe_kernels._cpu", "cpu"), ("triton", "triton")])
def test_a_missing_part_costs_its_kernels_and_is_named(part: str, backend: str) -> None:
    from stripe_kernels import list_kernels

    kernel = next(name for name in list_kernels() if name.split("_")[0] == backend)
    script = WITHOUT.format(part=part, kernel=kernel)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    left, message = result.stdout.split("\n", 1)
    assert left.split()
    assert not [name for name in left.split() if name.split("_")[0] == backend]
    assert part in message
    assert "pip install" in message


def test_hashed_pins_are_the_constraints() -> None:
    pins = dict(
        re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\n]+)", (ROOT / "requirements-dev.txt").read_text(), re.M)
    )
    wanted = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\n]+)", (ROOT / "constraints.txt").read_text(), re.M))
    del wanted["torch"]  # chosen by tools/install
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    wanted = {name.lower().replace("_", "-"): version for name, version in wanted.items()}
    assert {name: pins.get(name) for name in wanted} == wanted


def test_the_list_of_licences_is_of_what_is_pinned() -> None:
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\n]+)", (ROOT / "requirements-dev.txt").read_text(), re.M)
    listed = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", (ROOT / "docs/licences.md").read_text(), re.M)[1:]

    def plain(name: str) -> str:
        return re.sub(r"[._]", "-", name.lower())

    versions = {plain(name): version for name, version, _ in listed}
    assert versions.pop("torch")  # chosen by tools/install
    assert versions == {plain(name): version for name, version in pins}
    assert not [name for name, _, licence in listed if licence == "UNKNOWN"]
