"""torch's threads are ours: their number, their order of sums, forks, many callers at once, and the GIL."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stripe_kernels import StripeConv2d, freeze, ops, registry
from stripe_kernels.compile.optimize import compact
from stripe_kernels.compile.resident import resident
from stripe_kernels.registry import PASSES
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, Case, case, list_and_calls, live_stripes
from tests.passes import KERNELS, NATIVE, operands_of, problem_of, run

BUSY = case("busy", N=5, C=24, H=23, W=19, K=40, density=0.3)
SHARED = case("few blocks", N=1, C=40, H=6, W=5, K=48, density=0.3)


def layer(kernel: str = "auto") -> StripeConv2d:
    module = StripeConv2d(16, 24, 3, padding=1, skeleton=live_stripes("random", (24, 3, 3), 0.3, 0)).eval()
    module.kernel = kernel
    return module


def compute(case: Case, name: str, which, threads: int) -> list[Tensor]:
    """In every configuration offered for so many threads."""
    torch.set_num_threads(threads)
    operands = operands_of(case, torch.float32, "contiguous")
    kernel, problem = registry.find(name), problem_of(case, operands, which)
    return [run(kernel.build(problem, which, c), which, operands) for c in kernel.candidates(problem, which)]


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("kernel", NATIVE)
def test_bits_do_not_depend_on_the_number_of_threads(kernel: str, which) -> None:
    for problem in (*CASES.values(), BUSY, SHARED):
        first, *rest = compute(problem, kernel, which, 1)
        for threads in (2, 3):
            for result in (*rest, *compute(problem, kernel, which, threads)):
                assert torch.equal(result, first), f"{problem.name} {threads} threads"


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_do_not_depend_on_the_run(kernel: str) -> None:
    torch.set_num_threads(2)
    op = StripeOp.of(*BUSY.arguments, kernel)
    x, weight, dy, *_ = operands_of(BUSY, torch.float32, "contiguous")
    with torch.no_grad():
        results = [
            (ops.fprop(op, x, weight), ops.dgrad(op, dy, weight, x.shape[2:]), ops.wgrad(op, dy, x))
            for _ in range(20)
        ]
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, results[0], strict=True))


def test_set_num_threads_governs_the_next_call() -> None:
    op = StripeOp(*BUSY.arguments, NATIVE[0])
    x, weight, *_ = operands_of(BUSY, torch.float32, "contiguous")
    for threads in (1, 2, 1, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            ops.fprop(op, x, weight)
        assert {r.threads for r in op.checked.values()} >= {threads}


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_one_pool_serves_torch_and_the_kernels() -> None:
    torch.set_num_threads(2)
    a = torch.randn(300, 300)
    a @ a
    nn.functional.conv2d(torch.randn(8, 16, 30, 30), torch.randn(16, 16, 3, 3))
    before = count_threads()
    for which in PASSES:
        compute(BUSY, NATIVE[0], which, 2)
    assert count_threads() <= before + 1


def in_child(function) -> object:
    """What `function` returns in a forked child; TimeoutError when it hangs."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)
    child = context.Process(target=lambda: send.send(function()))
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
        raise TimeoutError("the forked child hangs")
    assert child.exitcode == 0
    return receive.recv()


@pytest.mark.parametrize("kernel", NATIVE)
def test_a_forked_child_computes_after_its_parent_did(kernel: str) -> None:
    torch.set_num_threads(2)
    expected = [compute(BUSY, kernel, which, 2)[0] for which in PASSES]

    def child() -> list[bool]:
        results = [compute(BUSY, kernel, which, 2)[0] for which in PASSES]
        torch.set_num_threads(1)  # a comparison of this size by torch's own threads hangs in a forked child
        return [torch.equal(a, b) for a, b in zip(results, expected, strict=True)]

    assert in_child(child) == [True] * 3
    assert torch.equal(compute(BUSY, kernel, "fprop", 2)[0], expected[0])


def whole_network(lanes: bool, threads: int = 1) -> Callable[[], Tensor]:
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    live = {"0": torch.rand(64, 3, 3) < 0.5, "2": torch.rand(64, 3, 3) < 0.5}
    x = torch.randn(16, 16, 40, 40)
    frozen = freeze(model, live)
    if lanes:
        return partial(resident(compact(frozen, (x,)).body, (x,), threads), x)
    return partial(list_and_calls(frozen, x, "cpu_pixels_generic")["list"], x)


@pytest.mark.parametrize("lanes", [False, True], ids=["list of calls", "batch lanes"])
def test_a_forked_child_runs_a_network_that_its_parent_ran(lanes: bool) -> None:
    with torch.inference_mode():
        torch.set_num_threads(2)
        network = whole_network(lanes, threads=2)
        expected = network().clone()

        def child() -> bool:
            with torch.inference_mode():
                y = network()
                torch.set_num_threads(1)
                return torch.equal(y, expected)

        assert in_child(child) is True
        assert torch.equal(network(), expected)


class Convolved(torch.utils.data.Dataset):
    def __init__(self, module: StripeConv2d) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.module(torch.full((16, 5, 5), float(index)))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    module = layer()
    expected = torch.stack([Convolved(module)[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(Convolved(module), 2, num_workers=2, multiprocessing_context=start)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("kernel", NATIVE)  # "auto" may take another one for another number of threads
def test_many_threads_share_a_module(kernel: str) -> None:
    module = layer(kernel)
    inputs = [torch.randn(1 + i % 3, 16, 5 + i % 4, 6) for i in range(24)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

    def work(i: int) -> bool:
        torch.set_num_threads(1 + i % 2)
        with torch.inference_mode():
            return torch.equal(module(inputs[i % 24]), expected[i % 24])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_many_threads_train_their_own_copies() -> None:
    x, weight, dy, *_ = operands_of(BUSY, torch.float32, "contiguous")
    op = StripeOp.of(*BUSY.arguments, "auto")
    torch.set_num_threads(1)

    def gradients(_: int) -> list[Tensor]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return list(torch.autograd.grad(ops.fprop(op, *leaves), leaves, dy))

    expected = gradients(0)
    with ThreadPoolExecutor(6) as pool:
        for actual in pool.map(gradients, range(30)):
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


LARGE = case("large", N=8, C=64, H=40, W=40, K=128, density=0.5)


def named_kernel(name: str, which: str, large: Case = LARGE) -> Callable[[], Tensor]:
    operands, kernel = operands_of(large, torch.float32, "contiguous"), registry.find(name)
    problem = problem_of(large, operands, which)
    runner = kernel.build(problem, which, next(iter(kernel.candidates(problem, which))))
    return lambda: run(runner, which, operands)


def packing(name: str) -> Callable[[], Tensor]:
    """Of 40 MB, which takes longer than a call of small kernels."""
    wide = case("wide", N=1, C=1024, H=3, W=3, K=1024, pattern="full")
    weight = torch.ones(wide.skeleton.stripes, 1024)
    op, x = StripeOp.of(*wide.arguments, name), torch.ones(1, 1024, 3, 3)
    return lambda: op.runner("fprop", tuple(x.shape), x).pack(weight)


ENTRIES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    **{f"pixels {which}": partial(named_kernel, "cpu_pixels_generic", which) for which in PASSES},
    "filters": partial(named_kernel, "cpu_filters_generic", "fprop"),
    "taps": partial(named_kernel, "cpu_taps_generic", "fprop"),
    **{
        f"packing for {name}": partial(packing, f"cpu_{name}_generic")
        for name in ("pixels", "filters", "taps")
    },
    "list of calls": partial(whole_network, False),
    "batch lanes": partial(whole_network, True),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_gil_is_released(entry: str) -> None:
    """A second Python thread goes on counting while native code runs: in every function of the extension that takes
    time."""
    torch.set_num_threads(1)
    stamps: list[float] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(1e-4)

    with torch.inference_mode():
        call = ENTRIES[entry]()
        call()
        thread = threading.Thread(target=count)
        thread.start()
        try:
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
        finally:
            stop.set()
            thread.join()
    assert sum(begin < t < end for t in stamps) > 3, f"held for {end - begin:.3f} s"


def test_a_call_within_a_parallel_region_of_torch() -> None:
    """Backward nodes and torch's own pools call kernels from threads that are not the main one."""
    module = layer(NATIVE[0]).train()
    x = torch.randn(4, 16, 9, 9, requires_grad=True)
    torch.set_num_threads(2)
    expected = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
    actual = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).square().sum(),
        (x, *module.parameters()),
    )
    futures = [torch.jit.fork(lambda: module(x).detach()) for _ in range(4)]
    for future in futures:
        assert torch.equal(torch.jit.wait(future), module(x).detach())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_many_threads_with_more_shapes_than_a_layer_remembers() -> None:
    """The oldest runners go while others are looked up and go too."""
    op = StripeOp(*CASES["pointwise"].arguments, "reference")
    torch.set_num_threads(1)
    before = sys.getswitchinterval()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            size = (1, CASES["pointwise"].shape.C, rng.randrange(1, 30), rng.randrange(1, 30))
            op.runner("fprop", size, torch.empty(size))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert len(op._runners) < 64 + 8


def test_the_oldest_runner_may_be_gone() -> None:
    """Another thread takes it when its key has been read: here always, above by chance."""

    class Shared(dict):
        def __iter__(self):
            keys = list(super().__iter__())
            self.pop(keys[0])
            return iter(keys)

    op = StripeOp(*CASES["pointwise"].arguments, "reference")
    op._runners = Shared.fromkeys(range(64))
    size = (1, CASES["pointwise"].shape.C, 2, 3)
    assert op.runner("fprop", size, torch.empty(size)) in op._runners.values()
    assert len(op._runners) == 64


def test_threads_may_be_first_to_use_the_library() -> None:
    """Backends load on first use: a second thread must not find half of the kernels."""
    script = (
        "import threading, torch; from concurrent.futures import ThreadPoolExecutor\n"
        "from stripe_kernels import stripe_conv2d\n"
        "gate = threading.Barrier(6)\n"
        "def work(_):\n"
        "    gate.wait()\n"
        "    live = torch.ones(2, 1, 1, dtype=torch.bool)\n"
        f"    stripe_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 2), live, kernel={NATIVE[0]!r})\n"
        "with ThreadPoolExecutor(6) as pool: list(pool.map(work, range(6)))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
