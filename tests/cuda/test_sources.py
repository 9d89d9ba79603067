"""What the sources of the GPU kernels keep to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import ROOT, needs_sources

MOST_LINES = 120  # of a function: DESIGN's "named phases"
CUDA = ROOT / "csrc/cuda"
SOURCES = sorted(p for pattern in ("*.cu", "*.h") for p in CUDA.rglob(pattern))
# Neither braces nor lines count in these, but for the ends of lines.
NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"' + r"|'(?:\\.|[^'\\\n])'", re.DOTALL)
NAME = re.compile(r"([\w:~]+|operator\W+)\s*\(")
NO_FUNCTION = ("namespace", "struct", "class", "union", "enum", "extern")


def functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines of its body from brace to brace) of every function, lambdas being a part of theirs."""
    text = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), source)
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    inside: list[tuple[str | None, int]] = []  # open braces: of a function its name, and where
    begin = 0  # of the declaration
    for at, letter in enumerate(text):
        if letter in ";}" or (letter == ":" and text[begin:at].strip() in ("public", "private", "protected")):
            begin = at + 1
        elif letter == "{":
            head = re.sub(r"template\s*<[^{;]*?>\s*(?=\w+\s)", "", text[begin:at]).strip()
            opens = not any(name for name, _ in inside) and head.split(" ")[0] not in NO_FUNCTION
            name = NAME.search(re.sub(r"__\w+__\s*\([^()]*\)", "", head)) if opens else None
            inside.append((name.group(1) if name else None, at))
            begin = at + 1
        if letter == "}":
            name_, first = inside.pop()
            if name_ is not None:
                yield name_, text.count("\n", first, at) + 1
    assert not inside, "braces do not match"


def test_the_scanner_knows_a_function() -> None:
    source = """
#define BRACE {
namespace a { namespace {
struct S { int x[2] = {1, 2}; __device__ int f() const { return x[0]; } };
// {
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2) kernel(const __grid_constant__ Params p) {
  const auto load = [&](int i) {
    return "}" + i;
  };
  for (;;) {
    /* } */
  }
}
inline int g() { return 1; }
}}  // namespace
"""
    assert list(functions(source)) == [("f", 1), ("kernel", 8), ("g", 1)]


@needs_sources
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CUDA)))
def test_no_function_is_too_long(path: Path) -> None:
    found = list(functions(path.read_text()))
    long = [f"{path.name}: {name} has {lines} lines" for name, lines in found if lines > MOST_LINES]
    assert not long, f"{'; '.join(long)}; at most {MOST_LINES}: cut it into named phases"
    if path.suffix == ".cu" and path.name != "runtime.cu":
        assert any(name.endswith("_kernel") for name, _ in found), "no kernel found: the scanner is blind"
