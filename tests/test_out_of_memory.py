"""Out of memory: a kernel, a packed weight or a file too large for the process raises with its size, and the process
goes on. Each try runs in a child whose address space may grow by 96 MiB."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.passes import NATIVE

BEGIN = """
    import resource, sys
    import torch
    from stripe_kernels import load, ops, stripe_conv2d
    from stripe_kernels.stripe_op import StripeOp
    from stripe_kernels.skeleton import FilterSkeleton

    torch.set_num_threads(1)
    LONG = 1 << 13

    def small(kernel="auto"):
        with torch.no_grad():
            live = torch.ones(2, 1, 1, dtype=torch.bool)
            y = stripe_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 2), live, kernel=kernel)
        assert y.sum() == 36

    def limit():
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20),) * 2)

    def refused(call):
        try:
            call()
        except (MemoryError, RuntimeError) as error:
            text = str(error)
            assert "bytes" in text and any(len(word) >= 8 for word in text.split() if word.isdigit()), text
        else:
            raise AssertionError("there was memory")
"""
# One row of pixels in all channels is 256 MiB, as is the weight; the tensors are views of a few values.
KERNEL = """
    name = sys.argv[1]
    small(name)

    def op(filters):
        return StripeOp.of(FilterSkeleton.full(filters, 1, 1).text, (1, 1), (0, 0, 0, 0), (1, 1), 1, name)

    wide, narrow = torch.ones(1, 1, 1, 1).expand(1, LONG, 1, LONG), torch.ones(1, 1, 1, LONG)
    one, many = op(1), op(LONG)
    limit()
    with torch.no_grad():
        if "filters" not in name:  # those read x where it lies
            refused(lambda: ops.fprop(one, wide, torch.ones(1, LONG)))
        refused(lambda: ops.dgrad(many, wide, torch.ones(LONG, 1), (1, LONG)))
        refused(lambda: ops.wgrad(one, narrow, wide))
        refused(lambda: ops.fprop(many, wide[..., :1], torch.ones(1, 1).expand(LONG, LONG)))  # packed
    small(name)
"""
FILE = """
    from torch import nn
    from stripe_kernels import freeze, save
    body = nn.Sequential(nn.Conv2d(2048, 4096, 3)).eval()  # 302 MiB
    save(freeze(body, {"0": torch.ones(4096, 3, 3, dtype=torch.bool)}), sys.argv[1])
    del body
    small()
    limit()
    try:
        load(sys.argv[1])
    except (MemoryError, RuntimeError, OSError) as error:
        assert not isinstance(error, FileNotFoundError) and str(error), error
    else:
        raise AssertionError("there was memory")
    small()
"""

# Maps of 128 MiB between two layers, in a list's arena or in a thread's lanes.
NETWORK = """
    from torch import nn
    from stripe_kernels import freeze
    from stripe_kernels.compile.optimize import compact
    body = nn.Sequential(nn.Conv2d(1, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 1)).eval()
    network = compact(freeze(body, {"0": torch.ones(32, 1, 1, dtype=torch.bool)}), (torch.ones(1, 1, 8, 8),))
    for layer in network.modules():
        if hasattr(layer, "_op"):
            layer.kernel = "cpu_pixels_generic"
    lanes = sys.argv[1] == "lanes"
    network.resident_from = 16 if lanes else None
    few, many = (torch.ones(16, 1, n, n) for n in (8, 256))
    with torch.inference_mode():
        network.forget()
        before = network(few)
        limit()
        refused(lambda: network(many))
        assert torch.equal(network(few), before)
"""


def run(program: str, *arguments: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(BEGIN + program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", [*NATIVE, "stripe_gemm"])
def test_no_memory_for_a_kernels_scratch_and_packed_weight(name: str) -> None:
    run(KERNEL, name)


@pytest.mark.parametrize("how", ["list", "lanes"])
def test_no_memory_for_a_whole_network(how: str) -> None:
    run(NETWORK, how)


def test_no_memory_for_a_file(tmp_path) -> None:
    run(FILE, str(tmp_path / "network"))
