"""Compiles every Triton kernel ahead of time for one GPU architecture, and prints what the machine code
holds as JSON.

    python compile_kernels.py 90

No GPU or driver is needed. Run in a process of its own: where TRITON_INTERPRET is set, kernels cannot be
compiled. Launches are built from tensors without memory (torch's "meta" device), by the same code that
launches them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stripe_kernels import backends, registry
from stripe_kernels.backends.triton.epilogue import epilogue_launch
from stripe_kernels.backends.triton.launch import Launch, wide
from stripe_kernels.backends.triton.pool import TritonMaxPool
from stripe_kernels.registry import Problem
from stripe_kernels.testing import Case, case

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# K and C that fill every configuration's tile, a stride and an epilogue that use every argument.
CASE = case("compiled", N=16, C=256, H=14, W=14, K=256, density=0.24)
HUGE = case("compiled huge", N=50_000, C=256, H=14, W=14, K=256, density=0.24)  # needs 64-bit offsets
# Configurations compiled whatever is predicted of them, for sm_90: split filters, and the widest gathers.
ALSO = {
    "fprop": [(128, 64, 64, 8, 8, 3), (128, 64, 64, 0, 8, 3), (256, 32, 64, 0, 8, 3)],
    "dgrad": [(128, 256, 32, 0, 0, 8, 3), (128, 128, 64, 0, 0, 8, 3), (128, 128, 32, 1, 0, 8, 3)],
    "wgrad": [(64, 128, 64, 4, 0, 8, 3), (64, 256, 32, 4, 0, 8, 3), (128, 128, 32, 4, 1, 8, 3)],
}
STEM = case(
    "compiled stem", N=16, C=3, H=32, W=32, K=64, R=7, S=7, stride=(2, 2), padding=(3, 3), density=1.0
)
HUGE_STEM = case("compiled huge stem", N=40_000, C=3, H=32, W=32, K=64, padding=(1, 1), density=1.0)
STRIDED = case("compiled strided", N=3, C=24, H=15, W=9, K=40, stride=(2, 1), dilation=(1, 2), groups=2)


def compile_launch(launch: Launch, capability: int) -> Any:
    """As triton's launcher specialises its arguments: ones become constants, multiples of 16 are known as
    such."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def describe(name: str, launch: Launch, capability: int) -> dict[str, Any]:
    compiled = compile_launch(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [str(TOOLS / tool), *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    counts = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert counts, usage
    return {
        "kernel": name,
        "registers": int(counts[1]),
        "stack": int(counts[2]),
        "shared": compiled.metadata.shared,
        "threads": 32 * launch.warps,
        "instructions": sorted(set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|LDGSTS)\b", code))),
        "accesses": sorted(set(re.findall(r"\b((?:LDGSTS|LDG|STG)\.[\w.]+)", code))),
        **inner_loop(code),
        "gathers": launch.arguments.get("LAST") is not None and not launch.arguments.get("ALIGNED"),
    }


def inner_loop(code: str) -> dict[str, Any]:
    """Of the loop with most products, or gathered values where no loop has products: its instructions, and its 16-bit
    loads."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append((found[1], found[2]))
    best: tuple[Any, list[str]] = ((0, 0, 0), [])
    for i, (name, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        if target and labels.get(target[0], len(instructions)) <= i:
            body = [n for n, _ in instructions[labels[target[0]] : i + 1]]
            products, narrow = (sum(word in n for n in body) for word in ("MMA", "LDG.E.U16"))
            best = max(best, ((products, narrow, -len(body)), body))
    (_, narrow, _), body = best
    return {"loop": len(body), "narrow_loads": narrow}


def meta(size: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    like = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=like)


def launches(
    case: Case, dtype: torch.dtype, last: bool, most: int, tf32: bool = True
) -> Iterator[tuple[str, Launch]]:
    """Each kernel in the `most` configurations that are predicted to be best."""
    s = case.shape
    rounded = dtype == torch.float32 and tf32
    problem = Problem(s, case.skeleton, str(dtype)[6:], "cuda", last, 1, (rounded, rounded))
    x, y = meta(s.input_size, dtype, last), meta(s.output_size, dtype, last)
    weight = torch.empty(case.skeleton.stripes, s.group_c, dtype=dtype, device="meta")
    vector = torch.empty(s.K, dtype=dtype, device="meta")
    kernel = registry.find("triton")
    kind = f"{problem.dtype}{' channels_last' if last else ''}{' 64-bit' if wide(x) else ''}"
    for which in registry.PASSES:
        configs = sorted(kernel.candidates(problem, which).items(), key=lambda item: item[1])
        names = [config for config, _ in configs[:most]]
        for config in names + (ALSO[which] if most > 1 else []):
            runner = kernel.build(problem, which, config)
            name = f"{which}{list(config)} {kind}"
            if which == "fprop" and runner.config.split:
                parts = torch.empty(runner.part_values(), dtype=dtype, device="meta")
                some = runner.config.split
                yield name, runner.launch(x[:some], runner.pack(weight), parts)
                yield (
                    f"gather parts {kind}",
                    runner.sum_launch(parts, y[:some], vector, vector, y[:some], "relu"),
                )
            elif which == "fprop":
                yield name, runner.launch(x, runner.pack(weight), y, vector, vector, y, "silu")
            elif which == "dgrad":
                dy = y.contiguous() if runner.config.planar else y
                yield name, runner.launch(dy, runner.pack(weight), x)
            else:
                dy = y.contiguous() if runner.config.planar else y
                parts = weight.new_empty(runner.config.splits, *weight.shape, dtype=torch.float32)
                yield name, runner.launch(dy, x, parts)
                yield f"sum of splits {kind}", runner.sum_launch(parts, weight)
    gemm = registry.find("stripe_gemm")
    for which in registry.PASSES:
        runner = gemm.build(problem, which, (s.N, 1))
        flat = torch.empty(runner.layout.values(s.N), dtype=dtype, device="meta")
        if which == "fprop":
            yield f"gather sum {kind}", runner.gather.sum_launch(flat, y, vector, vector, y, "hardswish")
        else:
            name = f"gather spread {runner.layout.kind}-major {kind}"
            yield name, runner.gather.spread_launch(y, 0, flat)


def beside(case: Case) -> Iterator[tuple[str, Launch]]:
    """What networks call besides kernels of the registry: a max pool, and the epilogue of torch's convolution."""
    s, dtype = case.shape, torch.bfloat16
    x = meta(s.input_size, dtype, True)
    y = meta((s.N, s.C, (s.H + 1) // 2, (s.W + 1) // 2), dtype, True)
    pool = TritonMaxPool(((3, 3), (2, 2), (1, 1), (1, 1)), x, tuple(y.shape))
    vector = torch.empty(s.C, dtype=dtype, device="meta")
    kind = " 64-bit" if wide(x) else ""
    yield f"max pool{kind}", pool.launch(x, y)
    yield f"epilogue{kind}", epilogue_launch(x, vector, vector, x, "silu")


def stem(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    s = case.shape
    problem = Problem(s, case.skeleton, str(dtype)[6:], "cuda", True, 1)
    runner = registry.find("triton_stem").build(problem, "fprop", (128, 64, 32, 8))
    weight = torch.empty(case.skeleton.stripes, s.group_c, dtype=dtype, device="meta")
    x, y = meta(s.input_size, dtype, True), meta(s.output_size, dtype, True)
    vector = torch.empty(s.K, dtype=dtype, device="meta")
    kind = " 64-bit" if wide(x, y) else ""
    yield f"stem {problem.dtype}{kind}", runner.launch(x, runner.pack(weight), y, vector, vector, y, "relu")


def main(capability: int) -> None:
    backends.load()
    most = 2 if capability == 90 else 1
    cases = [
        (CASE, torch.bfloat16, True, most),
        (CASE, torch.float16, False, 1),
        (STRIDED, torch.float32, False, 1),
    ]
    if capability == 90:
        cases += [(CASE, torch.float32, True, 1), (HUGE, torch.bfloat16, True, 1)]
    found = {name: launch for c in cases for name, launch in launches(*c)}
    found |= dict((*beside(CASE), *stem(STEM, torch.bfloat16)))
    if capability == 90:
        found |= dict((*beside(HUGE), *stem(HUGE_STEM, torch.bfloat16)))
        strict = launches(CASE, torch.float32, True, 1, tf32=False)
        found |= {f"{name} strict": launch for name, launch in strict if "gather" not in name}
    print(json.dumps([describe(name, launch, capability) for name, launch in found.items()]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
