"""The interpreter around the kernels: exit with a thread inside one, sub-interpreters."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "statement", ["import stripe_kernels", "import iessp", "from stripe_kernels import load"]
)
def test_sub_interpreters_are_refused(statement: str) -> None:
    """Before torch is imported there: torch itself hangs or ends the process."""
    result = run(SUB_INTERPRETER, statement)
    assert result.returncode == 0, result.stderr
