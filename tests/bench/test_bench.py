"""The benchmark's own code, on tiny sizes: what it times, checks, counts and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stripe_kernels
from bench.contestants import _window, contestants, kernel_names, slim_channels
from bench.job import PASSES, Entrant, Job, Refused
from bench.layers import Layer, layers, select
from bench.machine import Machine
from bench.networks import NetworkJob, network_macs, run_network, slim_width, wrong_layers
from bench.records import Row, Writer, read
from bench.run import compare, missing, run_layer
from bench.skeletons import GENERATORS, dead, iid, learned
from bench.timing import Ratio, Sample, interleave
from stripe_kernels import Roof, StripeConv2d, list_kernels, registry

TINY = (
    Layer("tiny", 6, 10, 7, 5),
    Layer("tiny", 5, 9, 8, 6, stride=2),
    Layer("tiny", 7, 6, 4, 3, R=1, S=1, padding=(0, 0)),
    Layer("tiny", 8, 8, 6, 6, groups=8),
)
ROOF = Roof("float32", 1, 1e11, 1e10)
NOTHING = Row("tiny", "fprop", 1, 0.5, "iid", 0, "float32", 1, "", "")


def job(layer: Layer, which: str = "fprop", batch: int = 3, density: float = 0.4) -> Job:
    return Job(layer, batch, iid(layer.filter_size, density, "a"), "iid", which, torch.float32, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.name)
def test_every_contestant_passes_the_oracle_or_says_why_not(layer: Layer, which: str) -> None:
    kernels = [name for name in list_kernels() if not name.startswith("triton")]
    rows = run_layer(job(layer, which), contestants(kernels, compile_=False), ROOF, 0.0, tuned=False)
    assert not [f"{row.contestant} {row.status}" for row in rows if row.status.startswith("wrong")]
    timed = {row.contestant for row in rows if row.seconds}
    assert {"auto", "auto channels_last", "eager contiguous", "eager channels_last"} <= timed
    assert all(row.status.startswith("refused: ") for row in rows if row.contestant not in timed)
    assert missing(rows).keys() == {row.contestant for row in rows} - timed
    if which == "fprop" and layer.groups == 1:
        assert {"paper", "slim contiguous"} <= timed


def test_a_wrong_contestant_is_reported_and_not_timed() -> None:
    called = []

    def entrant(result: str | None) -> Entrant:
        return Entrant("dense", lambda: called.append(result), lambda: result, 1.0)

    prepare = {"right": lambda: entrant(None), "broken": lambda: entrant("y is off by 3")}
    rows, ready = compare(
        NOTHING, prepare, dict.fromkeys(prepare, "dense"), 0.0, lambda e, t: {"macs": e.macs}
    )
    assert rows[1].status == "wrong: y is off by 3"
    assert rows[1].seconds is None
    assert rows[0].speedup == 1
    assert set(called) == {None}
    assert list(ready) == ["right"]


@pytest.mark.parametrize(("which", "result"), [("fprop", "y"), ("dgrad", "dx"), ("wgrad", "dw")])
def test_the_oracle_sees_one_wrong_value_and_a_nan(which: str, result: str) -> None:
    one = job(TINY[0], which, batch=9)
    tensor = contestants([], compile_=False)["auto"](one).call().clone()
    assert one.oracle.wrong(**{result: tensor}) is None
    tensor.view(-1)[0] += 0.01
    assert "budget" in one.oracle.wrong(**{result: tensor})
    if which != "wgrad":
        assert 1 not in one.oracle.images  # an image that is only searched for values that are not finite
        tensor.view(-1)[0] -= 0.01
        tensor[1, 0, 0, 0] = float("nan")
        assert "not finite" in one.oracle.wrong(**{result: tensor})


def test_rounds_are_interleaved_in_rotated_order() -> None:
    order: list[str] = []
    samples = interleave(
        {name: (lambda name=name: (order.append(name), time.sleep(0.06))) for name in "abc"}, 0.0
    )
    assert {s.n for s in samples.values()} == {5}
    assert [s.repeats for s in samples.values()] == [1, 1, 1]
    assert "".join(order[-15:]) == "cab" + "abc" + "bca" + "cab" + "abc"  # after two untimed rounds


def test_ratios_are_paired_by_round() -> None:
    drift = np.array([1.0, 5.0, 2.0, 9.0, 3.0, 4.0])
    ratio = Ratio.of(Sample(3 * drift, 1), Sample(drift, 1))
    assert (ratio.value, ratio.low, ratio.high) == (3, 3, 3)
    noisy = Ratio.of(Sample(np.array([2.0, 4, 2, 4, 2, 4]), 1), Sample(np.ones(6), 1))
    assert (noisy.low, noisy.high) == (2, 4)
    with pytest.raises(ValueError, match="5 and 6 rounds"):
        Ratio.of(Sample(np.ones(5), 1), Sample(np.ones(6), 1))


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
@pytest.mark.parametrize("density", [0.05, 0.1, 0.24, 0.5, 1.0])
def test_skeletons_have_the_density_asked_for_and_repeat(make: object, density: float) -> None:
    size = (40, 3, 2)
    live = make(size, density, "seed")
    assert live.stripes == round(density * 240)
    assert live == make(size, density, "seed")
    assert density == 1 or live != make(size, density, "other")
    expected = {iid: max(0, 40 - live.stripes), dead: 0 if density == 1 else max(10, 40 - live.stripes)}
    assert len(live.dead_filters) == expected[make]


def test_learned_skeletons_come_from_a_saved_network(tmp_path: Path) -> None:
    live = iid((8, 3, 3), 0.3, "a")
    network = nn.Sequential(StripeConv2d(4, 8, 3, skeleton=live), nn.ReLU())
    stripe_kernels.save(network, tmp_path / "net.safetensors")
    assert learned(tmp_path / "net.safetensors") == {"0": live}
    stripe_kernels.save(nn.Sequential(nn.Conv2d(4, 8, 3)), tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="no StripeConv2d"):
        learned(tmp_path / "dense.safetensors")


def test_layers_are_those_of_the_networks() -> None:
    assert len(layers()) == len({layer.name for layer in layers().values()})
    (vgg,) = select(["vgg16/512-512@2x2"])
    assert vgg.modules == ("features.34", "features.37", "features.40")
    (stem,) = select(["resnet18/3-64@*"])
    assert stem.case(2, iid(stem.filter_size, 0.5, "a")).shape.output_size == (2, 64, 112, 112)
    with pytest.raises(ValueError, match="no layer is called 'alexnet"):
        select(["alexnet/*"])


def test_work_counts_products_inside_the_image() -> None:
    for layer in TINY:
        one = job(layer)
        ones = torch.ones(one.case.shape.input_size, dtype=torch.float64)
        weight = one.skeleton[:, None].expand(-1, layer.C // layer.groups, -1, -1).double()
        counted = nn.functional.conv2d(ones, weight, None, layer.stride, layer.padding, 1, layer.groups).sum()
        assert one.macs == counted
        assert one.dense_macs >= one.macs


@pytest.mark.parametrize("offset", range(-3, 4))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_papers_windows_pair_outputs_with_the_inputs_they_read(offset: int, stride: int) -> None:
    size, out = 7, 4
    pairs = [(p, p * stride + offset) for p in range(out) if 0 <= p * stride + offset < size]
    window = _window(offset, size, out, stride)
    found = [] if window is None else list(zip(range(out)[window[0]], range(size)[window[1]], strict=True))
    assert found == pairs


def test_slim_layers_and_networks_have_the_multiply_adds_asked_for() -> None:
    assert slim_channels(64, 64, 0.25) == (32, 32)
    for c, k, density in ((512, 512, 0.24), (64, 128, 0.1), (256, 512, 0.5)):
        slim_c, slim_k = slim_channels(c, k, density)
        assert slim_c * slim_k == pytest.approx(density * c * k, rel=0.1)
    assert sum(network_macs("vgg16").values()) == 313_196_544
    assert slim_width("vgg16", 0.2412) == 0.5


def test_a_tiny_network_is_timed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.networks._fresh", lambda name, width=1.0: _tiny_network(width))
    monkeypatch.setattr("bench.networks.build", lambda name, classes, width=1.0: _tiny_network(width))
    monkeypatch.setitem(__import__("bench.layers").layers.NETWORKS, "vgg16", (10, 12))
    for which in ("inference", "training step"):
        rows = run_network(NetworkJob("vgg16", 4, "dead", which, 1, density=0.3), 0.0, compiled=False)
        assert not [row.status for row in rows if row.status.startswith("wrong")]
        assert {"freeze contiguous", "eager contiguous"} <= {row.contestant for row in rows if row.seconds}


def _tiny_network(width: float) -> nn.Module:
    k = round(16 * width)
    layers = [
        nn.Conv2d(3, k, 3, padding=1, bias=False),
        nn.BatchNorm2d(k),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(k, 10))


def test_a_training_step_is_checked_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(3, 6, 3, bias=False)
    network = nn.Sequential(
        StripeConv2d.from_conv2d(conv, iid((6, 3, 3), 0.4, "a")), nn.Flatten(), nn.Linear(96, 4)
    )
    x, target = torch.randn(5, 3, 6, 6), torch.arange(5) % 4
    assert wrong_layers(network, x, target) is None
    monkeypatch.setattr("bench.job.Oracle.wrong", lambda self, y, dx, dw: f"{y.shape} {dx.shape} {dw.shape}")
    network.zero_grad()
    assert "0: torch.Size([5, 6, 4, 4]) torch.Size([5, 3, 6, 6])" in wrong_layers(network, x, target)


def test_records_can_be_read_back(tmp_path: Path) -> None:
    machine = Machine.look(0.01)
    assert "cores" in str(machine)
    assert "quiet" in machine.load_text().lower()
    writer = Writer(tmp_path / "rows", machine, "python -m bench")
    rows = run_layer(job(TINY[0]), contestants([], compile_=False), ROOF, 0.0, tuned=True)
    writer.add(rows)
    writer.close()
    read_machine, found = read(tmp_path / "rows.json")
    assert read_machine["cpu"] == machine.cpu
    assert [row.contestant for row in found] == [row.contestant for row in rows]
    assert found[0].seconds == pytest.approx(rows[0].seconds, rel=1e-4)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == len(rows) + 1
    assert json.loads((tmp_path / "rows.json").read_text())["command"] == "python -m bench"
    assert rows[-1].contestant == "tuned"


def test_the_command_prints_tables_and_draws_charts(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bench.__main__ import app

    roof = ["--layers", "resnet56/16-32@32x32k1/2", "--batch", "1", "--density", ".5,.3", "--kernels", "none"]
    rest = ["--networks", "none", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*roof, *rest], catch_exceptions=False)
    assert result.exit_code == 0
    assert "fprop, float32, 1 thread" in result.output
    assert "not timed: compile" in result.output
    for kind in ("csv", "json", "png", "svg"):
        assert (tmp_path / f"run.{kind}").stat().st_size > 100
    assert CliRunner().invoke(app, ["--passes", "backward"]).exit_code == 2
    wrongs = ("--batch 0", "--density 1.5", "--kept 24", "--kernels nonesuch", "--layers nonesuch")
    for wrong in map(str.split, wrongs):
        assert CliRunner().invoke(app, wrong).exit_code == 2


def test_the_best_kernels_are_those_that_auto_chooses_from() -> None:
    automatic = {n for n, k in registry.kernels().items() if k.automatic and n.startswith("cpu_")}
    assert set(kernel_names("best")) == automatic


def test_a_kernel_that_cannot_run_is_refused_with_its_reason() -> None:
    one = Job(TINY[0], 2, iid(TINY[0].filter_size, 0.4, "a"), "iid", "fprop", torch.float64, 1)
    kernel = next(name for name in list_kernels() if name.startswith("cpu_"))
    with pytest.raises(Refused, match="float64"):
        contestants([kernel])[kernel](one)


SIGNALLED = """
import signal, torch
from bench.runtimes import convolution
from iessp.dense import openvino_call
x = torch.zeros(1, 2, 3, 3)
model = convolution(torch.zeros(2, 2, 1, 1), tuple(x.shape), 1, (0, 0), 1)
first, second = (openvino_call(model, x, 1) for _ in range(2))
del first, second  # in the order of their making
signal.signal(signal.SIGUSR1, lambda *_: print("alive"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_signal_after_openvino_does_not_end_the_process() -> None:
    pytest.importorskip("openvino")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SIGNALLED],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr


def test_a_rival_needs_no_budget_but_has_to_be_a_convolution() -> None:
    one = job(TINY[1])
    y = contestants([], compile_=False)["auto"](one).call().clone()
    rounded = y * (1 + 2e-7)
    assert one.oracle.far(rounded) is None
    assert "any order" in one.oracle.far(y.roll(1, dims=3))
    assert "any order" in one.oracle.far(y + 1e-3)
    y[1, 2, 3, 0] = float("nan")
    assert "any order" in one.oracle.far(y)
