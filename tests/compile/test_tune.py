"""Tuning, its cache, and optimize as a whole."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stripe_kernels import explain, freeze, optimize, plan, save, tune
from stripe_kernels.compile import cache
from stripe_kernels.compile import race as racing
from stripe_kernels.compile.exact import check_exact
from stripe_kernels.compile.freeze import UnchangedWarning
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.race import Ratio, race
from stripe_kernels.compile.tune import interleaved, sites
from stripe_kernels.plan import Candidate
from tests.compile.test_compact import assert_same
from tests.compile.zoo import masked, small

# The packages' attributes of these names are the functions.
optimizer = importlib.import_module("stripe_kernels.compile.optimize")
tuner = importlib.import_module("stripe_kernels.compile.tune")
ROOT = Path(__file__).parents[2]


def test_auto_takes_what_was_measured_fastest() -> None:
    model, x = small()
    plans = tune(model, x, seconds=0.01)
    assert list(plans) == ["0", "2"]
    for p in plans.values():
        timed = [c for c in p.candidates if c.measured]
        assert "dense" in {c.kernel for c in timed}
        assert p.chosen.measured == min(c.measured for c in timed if c.measured)
    chosen = {n: p.chosen for n, p in plans.items()}
    assert {s.name: s.op.plan("fprop", s.problem).chosen for s in sites(model, x)} == chosen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tuning_for_training_chooses_the_gradients_kernels(
    memory_format: torch.memory_format, tmp_path: Path
) -> None:
    model, x = small()
    x = x.contiguous(memory_format=memory_format)
    plan.forget()
    tune(model, x, seconds=0.01, folder=tmp_path, training=True)
    for site in sites(model, x):
        for which in ("fprop", "dgrad", "wgrad"):
            measured = plan.recorded(site.problem, which)
            assert {"dense"} < {c.kernel for c in measured}
            assert all(c.measured for c in measured)
            assert plan.make_plan(site.problem, which).chosen.measured == min(c.measured for c in measured)
    assert len(list(tmp_path.glob("*.json"))) == 6
    model(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def test_tuning_changes_no_output_beyond_rounding_and_no_model() -> None:
    model, x = small()
    model.train()
    before = model(x)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    tune(model, x, seconds=0.01)
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    torch.testing.assert_close(model(x), before)


def test_a_forced_kernel_stays() -> None:
    model, x = small()
    model[0].kernel = "dense"
    assert tune(model, x, seconds=0.01)["0"].chosen.kernel == "dense"


def test_the_cache_saves_measuring_again(own_tune_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    first = tune(model, x, seconds=0.01)
    assert len(list(own_tune_cache.glob("*.json"))) == 2
    plan.forget()
    monkeypatch.setattr(tuner, "measure", lambda *_: pytest.fail("measured again"))
    again = tune(model, x, seconds=0.01)
    assert {n: p.chosen for n, p in again.items()} == {n: p.chosen for n, p in first.items()}


def test_a_disturbed_measurement_is_taken_again(
    own_tune_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small()
    monkeypatch.setattr(tuner, "_DISTURBED", -1.0)
    assert all(p.chosen.measured for p in tune(model, x, seconds=0.01).values())
    assert not list(own_tune_cache.glob("*.json"))
    monkeypatch.setattr(tuner, "_DISTURBED", float("inf"))
    tune(model, x, seconds=0.01)
    assert len(list(own_tune_cache.glob("*.json"))) == 2


def test_scatter_is_what_the_middle_half_of_the_samples_spans() -> None:
    assert tuner._timing([2.0] * 5) == (2.0, 0.0)
    assert tuner._timing([1.0, 2.0, 2.0, 2.0, 50.0]) == (2.0, 0.0)
    assert tuner._timing([1.0, 1.0, 2.0, 5.0, 50.0]) == (2.0, 2.0)
    assert tuner._timing([2.0]) == (2.0, float("inf")), (
        "dropped at first sight: if it is best, the others met noise"
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"candidates": [["dense", [], null, -1]]}', b"\xff\x00"]
)
def test_a_broken_cache_file_counts_as_absent(content: bytes, own_tune_cache: Path) -> None:
    model, x = small()
    tune(model, x, seconds=0.01)
    for path in own_tune_cache.glob("*.json"):
        path.write_bytes(content)
    plan.forget()
    assert all(p.chosen.measured for p in tune(model, x, seconds=0.01).values())
    for path in own_tune_cache.glob("*.json"):
        assert json.loads(path.read_bytes())["candidates"]


def test_another_build_measures_again_beside_older_files(
    own_tune_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small()
    tune(model, x, seconds=0.01)
    older = {path.name: path.read_bytes() for path in own_tune_cache.glob("*.json")}
    plan.forget()
    monkeypatch.setattr(cache, "build_of", lambda package: "another")
    assert all(p.chosen.measured for p in tune(model, x, seconds=0.01).values())
    now = {path.name: path.read_bytes() for path in own_tune_cache.glob("*.json")}
    assert len(now) == 2 * len(older) == 4
    assert now.items() > older.items()


def test_a_build_is_its_sources_and_extensions(tmp_path: Path) -> None:
    def build() -> str:
        cache.build_of.cache_clear()
        return cache.build_of(tmp_path)

    (tmp_path / "backends").mkdir()
    source, extension = tmp_path / "backends/a.py", tmp_path / f"_b{EXTENSION_SUFFIXES[0]}"
    source.write_text("a = 1")
    extension.write_bytes(b"code")
    builds = [build()]
    for path, content in ((source, b"a = 2"), (extension, b"edoc")):
        path.write_bytes(content)
        builds.append(build())
    source.rename(tmp_path / "backends/b.py")
    builds.append(build())
    assert len(set(builds)) == 4
    (tmp_path / "py.typed").touch()
    (tmp_path / "backends/__pycache__").mkdir()
    (tmp_path / "backends/__pycache__/b.pyc").touch()
    assert build() == builds[-1]
    (tmp_path / ".#b.py").symlink_to("an editor's lock, of no file")
    build()
    cache.build_of.cache_clear()


def test_on_a_gpu_its_libraries_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    site = sites(model, x)[0]
    candidates = site.op.plan("fprop", site.problem).candidates
    monkeypatch.setattr(cache, "processor", lambda device: "one of this kind")

    def key(device: str) -> str:
        cache.gpu_libraries.cache_clear()
        return cache.key(replace(site.problem, device=device), "fprop", "none", candidates)

    cpu, keys = key("cpu"), [key("cuda")]
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99999)
    keys.append(key("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    keys.append(key("cuda"))
    driver = tmp_path / "version"
    monkeypatch.setattr(cache, "DRIVER", driver)
    keys.append(key("cuda"))
    driver.write_text("NVRM version: 999")
    keys.append(key("cuda"))
    assert len(set(keys)) == (5 if Path("/proc/driver/nvidia/version").exists() else 4)
    assert key("cpu") == cpu


def test_other_problems_have_other_keys() -> None:
    model, x = small()
    site = sites(model, x)[0]
    candidates = site.op.plan("fprop", site.problem).candidates
    other = sites(model, x[:1])[0]
    keys = {
        cache.key(site.problem, "fprop", site.epilogue, candidates),
        cache.key(site.problem, "fprop", "relu", candidates),
        cache.key(site.problem, "fprop", site.epilogue, candidates[:1]),
        cache.key(other.problem, "fprop", site.epilogue, candidates),
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"threads": 77},
        {"dtype": "bfloat16"},
        {"channels_last": True},
        {"shape": {"padding": (0, 0, 0, 0)}},
        {"shape": {"dilation": (2, 1)}},
    ],
    ids=str,
)
def test_all_that_a_measurement_depends_on_is_in_its_key(changed: dict[str, object]) -> None:
    problem = sites(*small())[0].problem
    if "shape" in changed:
        changed = {"shape": replace(problem.shape, **changed["shape"])}  # type: ignore[arg-type]
    other = replace(problem, **changed)  # type: ignore[arg-type]
    assert cache.key(problem, "fprop", "none", ()) != cache.key(other, "fprop", "none", ())
    assert cache.key(problem, "fprop", "none", ()) != cache.key(problem, "dgrad", "none", ())


@pytest.mark.parametrize("name", ["__version__", "torch.__version__", "processor"])
def test_another_library_or_machine_measures_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = sites(*small())[0].problem
    here = cache.key(problem, "fprop", "none", ())
    monkeypatch.setattr(
        f"stripe_kernels.compile.cache.{name}", (lambda _: "other") if name == "processor" else "other"
    )
    assert cache.key(problem, "fprop", "none", ()) != here


def test_a_reader_sees_whole_files_only(tmp_path: Path) -> None:
    """One thread writes while another reads: what it finds is one version or the other."""
    problem = sites(*small())[0].problem
    versions = [
        tuple(Candidate("dense", (i,), measured=seconds) for i in range(300)) for seconds in (1.0, 2.0)
    ]
    cache.write(tmp_path, "name", problem, "fprop", versions[0])
    stop = threading.Event()

    def write() -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            cache.write(tmp_path, "name", problem, "fprop", versions[n % 2])

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            for _ in range(50):
                assert cache.read(tmp_path, "name") in versions
        finally:
            stop.set()
        writer.result()
    assert [p.name for p in tmp_path.iterdir()] == ["name.json"]


def test_an_unwritable_cache_warns_and_still_tunes(tmp_path: Path) -> None:
    model, x = small()
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="this process only"):
        plans = tune(model, x, seconds=0.01, folder=tmp_path / "file")
    assert all(p.chosen.measured for p in plans.values())


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    import os

    for i in range(10):
        path = tmp_path / f"{i}.json"
        path.write_text("{}")
        os.utime(path, (i, i))
    cache.prune(tmp_path, kept=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7.json", "8.json", "9.json"]


def test_processes_may_write_at_once(own_tune_cache: Path) -> None:
    script = (
        "import sys; sys.path[:0] = ['.', 'python']; import torch; torch.set_num_threads(1)\n"
        "from tests.compile.test_tune import small, tuner; from stripe_kernels import tune\n"
        "tuner._DISTURBED = float('inf')\n"
        "print({n: p.chosen.kernel for n, p in tune(*small(), seconds=0.01).items()})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    files = list(own_tune_cache.iterdir())
    assert len(files) == 2
    assert all(json.loads(p.read_text())["candidates"] for p in files)


def test_interleaved_medians_and_drop_outs() -> None:
    counts = [0, 0]

    def fast() -> None:
        counts[0] += 1

    def slow() -> None:
        counts[1] += 1
        sum(range(200_000))

    times = interleaved([fast, slow], 0.0, least=7)
    assert times[0].median < times[1].median
    assert counts[1] == 3
    assert counts[0] > 7


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
def test_optimize_end_to_end(name: str) -> None:
    model, frozen, x = masked(name, 0.24)
    network = optimize(frozen, x)
    assert_same(model, network, [x, torch.randn(16, *x.shape[1:])])
    if isinstance(network, Network):
        assert "as fast as the model it was made from" in network.report[-1]
    else:  # a machine on which the rewrite does not pay
        assert "no clear gain" in network.report[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_the_check_of_exactness(dtype: torch.dtype) -> None:
    for name in ("resnet20", "squeeze_excite"):
        _, frozen, x = masked(name, 0.24)
        frozen, x = frozen.to(dtype), x.to(dtype)
        check_exact(frozen, optimizer.compact(frozen, (x,)), (x,))


def test_optimize_inside_inference_mode() -> None:
    model, frozen, x = masked("unet", 0.24)
    with torch.inference_mode():
        network = optimize(frozen, x)
    assert_same(model, network, [x])


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.Sequential(torch.compile(m))])
def test_optimize_takes_wrappers_off(wrap: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(0.5, 0.4, 0.6))
    model, x = small()
    network = optimize(wrap(model), x)  # type: ignore[operator]
    assert isinstance(network, Network)
    assert network.report[-1] == "2.00x [1.67, 2.50] as fast as the model it was made from"
    assert_same(model, network, [x])


def test_optimize_keeps_shared_modules_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """One convolution at two places with different neighbours: its weight is stored once while it stays the same."""
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(0.5, 0.4, 0.6))
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = freeze(
        nn.Sequential(shared, nn.ReLU(), shared, nn.BatchNorm2d(4), shared).eval(),
        {"0": torch.rand(4, 3, 3) < 0.6},
    )
    x = torch.randn(2, 4, 6, 5)
    network = optimize(model, x)
    assert_same(model, network, [x])
    weights = {
        p.data_ptr() for n, p in network.named_parameters(remove_duplicate=False) if n.endswith("weight")
    }
    assert len(weights) == 2  # the one before the norm is scaled


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = small()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if x.sum() > 0 else self.model(-x)


def test_optimize_keeps_what_it_cannot_follow_and_says_why() -> None:
    model, x = Branch().eval(), small()[1]
    with pytest.warns(UserWarning, match="torch.fx cannot follow Branch"):
        kept = optimize(model, x)
    assert "torch.fx cannot follow" in kept.report[0]
    assert not any(p.requires_grad for p in kept.parameters())
    assert any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(kept(x), model(x))


class Reporting(nn.Module):
    """A model with something of its own by the name of what `optimize` leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def report(self) -> str:
        return "mine"


def test_a_report_of_the_models_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Reporting().eval(), small()[1]
    assert explain(model, x).notes == []
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(1.0, 1.0, 1.0))
    with pytest.warns(UserWarning, match="no clear gain"):
        assert optimize(model, x).report() == "mine"


@pytest.mark.parametrize(
    ("ratio", "kept"), [((0.9, 0.85, 0.95), False), ((0.98, 0.95, 1.01), True), ((1.2, 1.1, 1.3), True)]
)
def test_optimize_keeps_the_model_unless_the_rewrite_wins_clearly(
    ratio: tuple[float, float, float], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small()
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(*ratio))
    with pytest.warns(UserWarning, match=r"no clear gain") if kept else nullcontext():
        found = optimize(model, x)
    assert isinstance(found, Network) is not kept
    with torch.inference_mode():
        torch.testing.assert_close(found(x), model(x))
        assert not kept or torch.equal(found(x), model(x))


def test_a_network_without_dead_stripes_is_not_replaced_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks of one speed: however the clock wavers, at most one in twenty races is won."""
    rng = random.Random(0)
    won = [Ratio.of([rng.lognormvariate(0.0, 0.1) for _ in range(40)]).faster for _ in range(400)]
    assert 0 < sum(won) < 0.05 * len(won)
    assert all(Ratio.of([rng.lognormvariate(-0.1, 0.1) for _ in range(40)]).faster for _ in range(50))
    with pytest.raises(ValueError, match="9 rounds"):
        Ratio.of([1.0] * 8)


class Clock:
    """Time that only timed calls spend: calls of known speeds on a machine that is disturbed in some rounds."""

    def __init__(self, speeds: dict[Callable[[], None], float], disturbed: float, seed: int) -> None:
        self.now, self.speeds, self.disturbed, self.rng = 0.0, speeds, disturbed, random.Random(seed)

    def perf_counter(self) -> float:
        return self.now

    def sample(self, call: Callable[[], None], repeats: int, device: torch.device | None) -> float:
        factor = self.rng.lognormvariate(0.0, 0.1)
        took = self.speeds[call] * factor * (8 if self.rng.random() < self.disturbed else 1)
        self.now += took
        return took


def raced(speed: float, disturbed: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Ratio, float]:
    """A race of a second between calls of `speed` and 1 times 40 ms, and the seconds that it took."""

    def one() -> None: ...
    def other() -> None: ...

    clock = Clock({one: 0.04 * speed, other: 0.04}, disturbed, seed)
    monkeypatch.setattr(racing, "sample", clock.sample)
    monkeypatch.setattr(racing, "time", clock)
    return race(one, other, 1.0), clock.now


def test_a_disturbed_race_goes_on_until_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = [raced(0.5, 0.0, seed, monkeypatch) for seed in range(50)]
    assert all(found.faster and spent < 1.5 for found, spent in calm)
    rough = [raced(0.5, 0.3, seed, monkeypatch) for seed in range(50)]
    assert sum(found.faster for found, _ in rough) > 45
    assert all(spent < 12 for _, spent in rough)


def test_going_on_does_not_make_luck_of_equal_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    won = [raced(1.0, 0.1, seed, monkeypatch)[0].faster for seed in range(1000)]
    assert sum(won) < 0.05 * len(won)


def test_a_race_of_known_speeds() -> None:
    ratio = race(lambda: sum(range(2_000)), lambda: sum(range(20_000)), 0.02)
    assert ratio.low <= ratio.median <= ratio.high < 0.5
    assert ratio.faster


def test_optimize_keeps_the_model_where_the_rewrite_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    honest = optimizer.compact

    def spoiled(*arguments: object) -> Network:
        network = honest(*arguments)  # type: ignore[arg-type]
        next(p for n, p in network.named_parameters() if n.endswith("bias")).data.add_(1e-4)
        return network

    monkeypatch.setattr(optimizer, "compact", spoiled)
    with pytest.warns(UserWarning, match="largest error against float64"):
        kept = optimize(model, x)
    assert not isinstance(kept, Network)


def test_what_is_no_module_is_named() -> None:
    for verb in (tune, explain, optimize):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, got int"):
            verb(3, torch.randn(1, 3, 8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [[torch.ones(1, 4, 9, 8)], (1, 4, 9, 8), None, ()])
def test_an_example_is_tensors(wrong: object, tmp_path: Path) -> None:
    frozen, given = small()[0], r"example_input must be a tensor or a tuple of tensors, got "
    calls = {verb.__name__: partial(verb, frozen) for verb in (explain, optimize)}
    if wrong is not None:
        calls["save"] = partial(save, frozen, tmp_path / "net")
    said = {"list": "list", "NoneType": "NoneType", "tuple": r"a tuple of \("}[type(wrong).__name__]
    for call in calls.values():
        with pytest.raises(TypeError, match=given + said):
            call(wrong)
    assert not list(tmp_path.iterdir())


def test_tune_takes_whatever_a_model_does() -> None:
    frozen, x = small()

    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = frozen

        def forward(self, images: list[torch.Tensor], beside: None) -> list[torch.Tensor]:
            return [self.net(image) for image in images]

    assert tune(Lists(), ([x, x], None), seconds=0.01)


class Recurrent(nn.Module):
    """Its second input is a tuple, as of nn.LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.columns = small()[0], nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.columns(self.net(x).mean(2).transpose(1, 2), state)[0]


def test_a_tuple_among_the_inputs_keeps_the_model() -> None:
    model, x, zeros = Recurrent().eval(), small()[1], torch.zeros(1, 2, 5)
    given = (x, (zeros, zeros))
    with pytest.warns(UnchangedWarning, match=r"it takes \(Tensor, tuple\), and a rewritten network tensors"):
        kept = optimize(model, given)
    torch.testing.assert_close(kept(*given), model(*given))
    explained = explain(kept, given)
    assert [row["layer"] for row in explained.rows] == ["net.0", "net.2"]
    assert all(row["measured_ms"] for row in explained.rows)
    assert explained.input == list(x.shape)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_called_so(value: float) -> None:
    model, x = small()
    model[2].bias.data[1] = value
    with pytest.warns(UserWarning, match="its own output in torch.float32 is not finite"):
        kept = optimize(model, x)
    assert not isinstance(kept, Network)


def test_an_empty_example_is_called_so() -> None:
    with pytest.warns(UserWarning, match=r"the example \[0, 4, 9, 8\] holds no values to compare"):
        optimize(small()[0], torch.ones(0, 4, 9, 8))


def test_a_captured_call_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights are made before the capture: once freed, torch gives them back to the driver before the next one,
    and the replay reads unmapped memory (an illegal address, seen on an H200)."""

    class Graph:
        replayed = 0

        def replay(self) -> None:
            self.replayed += 1

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class Packed:
        pass

    made: list[Graph] = []

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(tuner, "_is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    for context in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, context, lambda what: nullcontext())
    packed = Packed()
    alive = weakref.ref(packed)
    replay = tuner._ready(partial(id, packed), torch.device("cuda"), cuda_graphs=True)
    del packed
    gc.collect()
    assert alive() is not None
    replay()
    assert made[0].replayed == 1


def test_a_kernel_that_fails_on_a_gpu_is_left_out_and_dense_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is at hand: the device type alone is pretended."""
    model, x = small()
    site = sites(model, x)[0]

    def failing(names: set[str]):  # type: ignore[no-untyped-def]
        def ready(self, candidate, weight, which):  # type: ignore[no-untyped-def]
            def call() -> None:
                if candidate.kernel in names:
                    raise RuntimeError("out of resources: shared memory")

            call()
            return call

        return ready

    monkeypatch.setattr(tuner, "_is_gpu", lambda device: True)
    monkeypatch.setattr(tuner, "_ready", lambda call, device, cuda_graphs: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    others = {c.kernel for c in tuner.candidates(site)} - {"dense"}
    monkeypatch.setattr(tuner.Site, "call", failing(others))
    measured, _ = tuner.measure(site, 0.01)
    assert {c.kernel for c in measured if c.measured} == {"dense"}
    assert any("shared memory" in str(c.refusal) for c in measured)
    monkeypatch.setattr(tuner.Site, "call", failing({"dense"}))
    with pytest.raises(RuntimeError, match="shared memory"):
        tuner.measure(site, 0.01)
