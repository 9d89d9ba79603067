"""The interpreter around the kernels: exit with a thread inside one, sub-interpreters, no memory left."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.passes import NATIVE

ROOT = Path(__file__).parents[1]


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


# No torch: its own functions give up the GIL too, and a thread inside one of those is torch's to end.
INSIDE_A_KERNEL = """
    import ctypes, importlib.util, sys, threading, time
    spec = importlib.util.spec_from_file_location("stripe_kernels._cpu", sys.argv[1])
    _cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_cpu)

    n, c, h, w, k = 1, 16, 16, 16, 16
    kernel = _cpu.Fprop([n, c, h, w, k, 1, 1, h, w, 1, 1, 0, 0, 1, 1, 1], [0, k], list(range(k)), list(range(k)),
                        [0, 1, 4, 1, 12], _cpu.isas()[0])
    memory = [ctypes.create_string_buffer(4 * size) for size in (n * c * h * w, kernel.packed_floats, n * k * h * w)]
    x, packed, y = map(ctypes.addressof, memory)
    strides = (c * h * w, h * w, w, 1)

    def forever():
        while True:
            kernel.run(1, x, 0, strides, packed, y, 0, strides, 0, 0, 0, (0, 0, 0, 0), 0)

    for _ in range(3):
        threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.02)
"""


def test_the_interpreter_exits_while_daemon_threads_are_inside_kernels() -> None:
    """py::gil_scoped_release in place of bindings/gil.h ends most of these processes with SIGABRT."""
    from stripe_kernels import _cpu

    for attempt in range(12):
        result = run(INSIDE_A_KERNEL, _cpu.__file__)
        assert result.returncode == 0, f"attempt {attempt}: {result.stderr}"


SUB_INTERPRETER = """
    import sys
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    code = '''
    import sys
    sys.path[:0] = %r
    try:
        %s
    except ImportError as error:
        assert "main interpreter" in str(error), error
    else:
        raise AssertionError("imported")
    assert "torch" not in sys.modules
    ''' % (sys.path, sys.argv[1])
    import textwrap
    failure = interpreters.run_string(interpreters.create(), textwrap.dedent(code))
    assert not failure, failure
"""


@pytest.mark.parametrize("statement", ["import stripe_kernels", "import iessp", "from stripe_kernels import load"])
def test_sub_interpreters_are_refused(statement: str) -> None:
    """Before torch is imported there: torch itself hangs or ends the process."""
    result = run(SUB_INTERPRETER, statement)
    assert result.returncode == 0, result.stderr


def test_the_extension_refuses_sub_interpreters_itself() -> None:
    from stripe_kernels import _cpu

    load = f"from importlib.machinery import ExtensionFileLoader as L; import importlib.util as u; "
    load += f"s = u.spec_from_file_location('_cpu', {_cpu.__file__!r}); u.module_from_spec(s).__spec__.loader"
    result = run(SUB_INTERPRETER, load)
    assert result.returncode == 0, result.stderr


NO_MEMORY = """
    import resource, sys
    import torch
    from stripe_kernels import ops, registry
    from stripe_kernels.ops import StripeOp
    from stripe_kernels.testing import case

    kernel, which, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(2)
    small, large = (case("", N=n, C=64, H=64, W=64, K=64, density=0.3) for n in (1, 4))

    def compute(c, operands):
        op, (x, weight, dy, *_) = StripeOp.of(*c.arguments, kernel), operands
        with torch.no_grad():
            if which == "fprop":
                return ops.fprop(op, x, weight)
            return ops.dgrad(op, dy, weight, x.shape[2:]) if which == "dgrad" else ops.wgrad(op, dy, x)

    first, big = small.operands(), large.operands()
    expected = compute(small, first)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    failed = 0
    kept = []  # what is left is given away in pieces, so that every later allocation of a call is the failing one once
    for piece in (1 << 22, 1 << 20, 1 << 18, 1 << 16):
        for _ in range(64):
            try:
                compute(large, big)
            except (MemoryError, RuntimeError) as error:
                failed += 1
            try:
                kept.append(torch.empty(piece, dtype=torch.uint8))
            except RuntimeError:
                break
    kept.clear()
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert failed, "there was memory enough"
    assert torch.equal(compute(small, first), expected)
    compute(large, big)
"""


@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("kernel", [name for name in NATIVE if name.endswith(("generic", NATIVE[0].rsplit("_")[-1]))])
def test_no_memory_left_raises_and_the_process_goes_on(kernel: str, which: str) -> None:
    result = run(NO_MEMORY, kernel, which, str(24 << 20))
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
