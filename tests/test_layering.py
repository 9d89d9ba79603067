"""Who may import whom, the rules of DESIGN.md, read off the sources: nothing is imported or compiled here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tree import ROOT, needs_sources

pytestmark = needs_sources
PACKAGE = ROOT / "stripe_kernels"
IESSP = ROOT / "python/iessp"

# Each module may import only what stands before it, so the order is also free of cycles.
ORDER = (
    *(
        "interpreter",
        "version",
        "geometry",
        "skeleton",
        "packed",
        "phases",
        "roofline",
        "roof",
        "epilogue",
        "kept",
        "indices",
        "registry",
        "plan",
    ),
    *("backends", "eager", "stripe_op", "checks", "snapshots", "optimizers"),
    *("ops", "front", "functional", "modules", "compile", "hub"),
)
BACKENDS_MAY_IMPORT = {*ORDER[: ORDER.index("backends") + 1], "_cpu", "_cuda"}
LOADER = PACKAGE / "backends/__init__.py"
ORACLE_KERNEL = PACKAGE / "backends/reference.py"  # offers the oracle as the kernel named "reference"
NATIVE = {"_cpu": "backends/cpu.py", "_cuda": "backends/cuda.py"}
TORCH_FREE = ("geometry", "phases", "roofline", "registry")
CSRC_MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "bindings": {"core", "cpu", "cuda", "bindings"},
}


@dataclass(frozen=True)
class Import:
    module: str  # absolute, with the imported name appended where that name is a module of the project
    line: int
    lazy: bool  # inside a function, or for the type checker alone

    def within(self, package: str) -> str | None:
        """The first name below `package`: "" for the package itself, None for another package."""
        if self.module != package and not self.module.startswith(package + "."):
            return None
        return self.module.removeprefix(package).removeprefix(".").split(".")[0]


def dotted_name(path: Path) -> str:
    base = IESSP.parent if path.is_relative_to(IESSP) else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def is_module(dotted: str) -> bool:
    for base in (ROOT, IESSP.parent):
        path = base.joinpath(*dotted.split("."))
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return True
    return dotted in {f"stripe_kernels.{name}" for name in NATIVE}


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(), str(path))
    package = dotted_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def lazy_block(node: ast.AST) -> bool:
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        return guard or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if is_module(inner) else source, node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or lazy_block(node))

    yield from visit(tree, False)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def where(path: Path, item: Import) -> str:
    return f"{path.relative_to(ROOT)}:{item.line} imports {item.module}"


def public_names() -> set[str]:
    """`__all__` of the runtime."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("stripe_kernels/__init__.py has no __all__")


def names_used(path: Path) -> set[str]:
    """What `path` takes from stripe_kernels: imported from it, or as stripe_kernels.NAME."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom) and node.module == "stripe_kernels":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "stripe_kernels":
            used.add(node.attr)
    return used


def backend_of(dotted: str) -> str:
    """The family a backend module belongs to: cpu for .cpu and .cpu_tiling, triton for .triton.fprop."""
    return dotted.removeprefix("stripe_kernels.backends").removeprefix(".").split(".")[0].split("_")[0]


def layer_of(path: Path) -> str:
    """The top-level module of stripe_kernels that `path` belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


RUNTIME = python_files(PACKAGE)


def test_there_is_a_runtime_to_look_at() -> None:
    assert {layer_of(path) for path in RUNTIME} >= {"geometry", "skeleton", "ops", "functional", "modules"}


@pytest.mark.parametrize(
    "path",
    [p for p in RUNTIME if layer_of(p) in ORDER and (p == LOADER or LOADER.parent not in p.parents)],
    ids=dotted_name,
)
def test_modules_import_only_what_stands_before_them(path: Path) -> None:
    layer = layer_of(path)
    allowed = ORDER[: ORDER.index(layer) + 1]
    for item in imports_of(path):
        assert item.within("stripe_kernels") in (None, *allowed), where(path, item)


def test_backends_are_imported_lazily_and_only_by_their_loader() -> None:
    """`backends` itself is the loader; it imports its modules by name when first asked, never at import."""
    for path in RUNTIME:
        if path.is_relative_to(LOADER.parent) and path != LOADER:
            continue
        for item in imports_of(path):
            inside = item.within("stripe_kernels.backends")
            assert not inside or (path == LOADER and item.lazy), where(path, item)


def test_every_module_has_a_place() -> None:
    known = {*ORDER, "__init__", "reference", "testing", "diagnosis"}
    assert {layer_of(path) for path in RUNTIME} <= known, "give the new module its place in ORDER"


@pytest.mark.parametrize("path", python_files(PACKAGE / "backends"), ids=dotted_name)
def test_backends_know_neither_each_other_nor_what_calls_them(path: Path) -> None:
    own = backend_of(dotted_name(path))
    for item in imports_of(path):
        target = item.within("stripe_kernels")
        if target is None or (path, target) == (ORACLE_KERNEL, "reference"):
            continue
        assert target in BACKENDS_MAY_IMPORT, where(path, item)
        if target == "backends" and own:
            assert backend_of(item.module) in (own, ""), where(path, item)


def test_each_native_extension_has_one_importer() -> None:
    for path in RUNTIME:
        for item in imports_of(path):
            target = item.within("stripe_kernels")
            if target in NATIVE:
                assert path == PACKAGE / NATIVE[target], where(path, item)


def test_the_oracle_imports_torch_alone() -> None:
    allowed = {"__future__", "torch"}
    assert {item.module.split(".")[0] for item in imports_of(PACKAGE / "reference.py")} <= allowed


def test_nothing_optimised_imports_the_oracle() -> None:
    for path in RUNTIME:
        if layer_of(path) == "testing" or path == ORACLE_KERNEL:
            continue
        assert [where(path, i) for i in imports_of(path) if i.within("stripe_kernels") == "reference"] == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_index_mathematics_is_free_of_torch(name: str) -> None:
    imported = {item.module.split(".")[0] for item in imports_of(PACKAGE / f"{name}.py")}
    assert not imported & {"torch", "triton"}


@pytest.mark.parametrize("path", python_files(IESSP), ids=dotted_name)
def test_learning_uses_the_public_names_only(path: Path) -> None:
    for item in imports_of(path):
        assert item.within("stripe_kernels") in (None, ""), where(path, item)
    assert names_used(path) <= public_names()


def test_nothing_in_the_runtime_imports_learning_benchmarks_or_tests() -> None:
    for path in [*RUNTIME, *python_files(IESSP)]:
        forbidden = {"tests", "bench"} if path.is_relative_to(IESSP) else {"tests", "bench", "iessp"}
        for item in imports_of(path):
            assert item.module.split(".")[0] not in forbidden, where(path, item)


@pytest.mark.parametrize("path", python_files(ROOT / "bench"), ids=dotted_name)
def test_benchmarks_use_the_public_names_and_testing(path: Path) -> None:
    for item in imports_of(path):
        assert item.within("stripe_kernels") in (None, "", "testing"), where(path, item)
        assert item.module.split(".")[0] != "tests", where(path, item)


def csrc_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cu"))


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", csrc_files(), ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_native_code_keeps_its_layers(path: Path) -> None:
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for header in includes_of(path):
        first = header.split("/")[0]
        assert first not in ("torch", "ATen", "c10"), f"{path}: torch headers stay out of csrc: {header}"
        assert first not in CSRC_MAY_INCLUDE or first in CSRC_MAY_INCLUDE[folder], f"{path} includes {header}"
        if first in ("pybind11", "Python.h"):
            assert folder == "bindings", f"{path}: only bindings know Python: {header}"
