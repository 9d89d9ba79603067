"""What `python -m tests.cuda.same_code` takes for the same, and what it does not."""

from __future__ import annotations

from pathlib import Path

from tests.cuda.same_code import compile_for, differences, readable
from tests.cuda.test_machine_code import needs_nvcc

KERNEL = """
namespace {
__global__ void NAME(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x] FACTOR; }
}
void launch(float* y, const float* x) { NAME<<<1, 32>>>(y, x); }
"""


def test_a_name_is_read_without_its_anonymous_namespace() -> None:
    mangled = "_ZN2sk4cuda41_GLOBAL__N__35d8a568_9_reduce_cu_1b254baa13reduce_kernelIfEEvNS0_9ReductionE"
    assert readable(mangled) == "_ZN2sk4cuda13reduce_kernelIfEEvNS0_9ReductionE"
    assert readable("plain") == "plain"


def test_what_differs_is_named_and_a_new_name_is_no_difference() -> None:
    before = {"a": b"1", "b": b"2"}
    assert differences(before, {"b": b"2", "a": b"1"}) == []
    assert differences(before, {"a": b"1", "other": b"2"}) == []
    assert differences(before, {"a": b"1", "b": b"3"}) == ["b differs"]
    assert differences(before, {"a": b"1"}) == ["b is gone, or differs under another name"]
    assert differences(before, {**before, "c": b"2"}) == ["a kernel of 1 bytes is new"]
    assert differences({"a": b"1", "b": b"1"}, {"c": b"1"}), "two kernels are not one"


@needs_nvcc
def test_machine_code_tells_arithmetic_from_names(tmp_path: Path) -> None:
    def code(folder: str, name: str, factor: str) -> dict[str, bytes]:
        source = tmp_path / folder / "csrc/cuda" / f"{name}.cu"
        source.parent.mkdir(parents=True)
        source.write_text(KERNEL.replace("NAME", name).replace("FACTOR", factor))
        return compile_for(source, "sm_80")

    before = code("before", "twice", "* 2.f")
    assert len(before) == 1
    assert differences(before, code("renamed", "doubled", "* 2.f /* the same */")) == []
    assert differences(before, code("changed", "twice", "* 3.f")) != []
