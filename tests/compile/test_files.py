"""save and load: same bits, small, whole or not at all; any other content is refused with a reason."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from iessp.models import build
from stripe_kernels import StripeConv2d, example_input, freeze, load, plan, save
from stripe_kernels.compile import files
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact
from tests.compile.zoo import NETS, masked


def random_skeletons(model: nn.Module, density: float) -> dict[str, Tensor]:
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: torch.rand(m.out_channels, *m.kernel_size) < density for n, m in convolutions.items()}


@pytest.fixture(scope="module")
def frozen() -> nn.Module:
    torch.manual_seed(0)
    model = build("resnet20", classes=10, width=0.5).eval()
    return freeze(model, random_skeletons(model, 0.24))


@pytest.fixture
def path(frozen: nn.Module, tmp_path: Path) -> Path:
    save(frozen, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def rewritten(path: Path, change: object, seal: bool = True) -> Path:
    """The same file after `change(graph, tensors)`, with a right checksum if `seal`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    graph = json.loads(metadata["stripe_kernels"])
    change(graph, tensors)  # type: ignore[operator]
    text = json.dumps(graph)
    checksum = files._checksum(text, tensors) if seal else metadata["sha256"]
    save_file(tensors, path, {"stripe_kernels": text, "sha256": checksum})
    return path


@pytest.mark.parametrize("optimized", [False, True])
def test_a_fresh_process_repeats_the_bits_without_training_code(
    optimized: bool, frozen: nn.Module, path: Path
) -> None:
    x = torch.randn(3, 3, 32, 32)
    network = compact(frozen, (x,)) if optimized else frozen
    save(network, path)
    with torch.inference_mode():
        expected = network(x)
    torch.save((x, expected), path.with_suffix(".pt"))
    script = (
        "import sys, torch; from stripe_kernels import load; torch.set_num_threads(int(sys.argv[3]))\n"
        "net = load(sys.argv[1]); x, y = torch.load(sys.argv[2])\n"
        "with torch.inference_mode(): assert torch.equal(net(x), y)\n"
        "assert not any(name.split('.')[0] == 'iessp' for name in sys.modules)\n"
    )
    arguments = [str(path), str(path.with_suffix(".pt")), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=Path(__file__).parents[2])


def test_names_flags_and_training_survive(frozen: nn.Module, path: Path) -> None:
    frozen.get_parameter("classifier.bias").requires_grad_(False)
    save(frozen, path)
    loaded = load(path)
    expected = frozen.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    flags = {n: p.requires_grad for n, p in frozen.named_parameters()}
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == flags
    loaded.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert any(isinstance(m, StripeConv2d) and m.weight.grad is not None for m in loaded.modules())


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_the_file_shrinks_with_the_density(density: float, tmp_path: Path) -> None:
    model = build("vgg16", classes=10, width=0.5)
    save(model, tmp_path / "dense")
    save(freeze(model, random_skeletons(model, density)), tmp_path / "frozen")
    ratio = (tmp_path / "frozen").stat().st_size / (tmp_path / "dense").stat().st_size
    assert ratio < density + 0.015


def values_in(path: Path) -> int:
    """Bytes of a file after the header, whose length stands before it."""
    whole = path.read_bytes()
    return len(whole) - 8 - int.from_bytes(whole[:8], "little")


@pytest.mark.parametrize("density", [0.5, 0.24, 0.1])
@pytest.mark.parametrize("name", NETS)
def test_parameters_and_files_fall_with_the_stripes(name: str, density: float, tmp_path: Path) -> None:
    """Of a convolution the live stripes and one bit a stripe are stored, and nothing is larger after `optimize`."""
    model, frozen, x = masked(name, density)
    stripes = {n: (m.weight != 0).any(1) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    gone = bits = 0
    for conv_name, live in stripes.items():
        layer = frozen.get_submodule(conv_name)
        assert isinstance(layer, StripeConv2d)
        assert layer.weight.shape == (live.sum(), model.get_submodule(conv_name).weight.shape[1])
        gone += int((~live).sum()) * layer.weight.shape[1]
        bits += -(-live.numel() // 8)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, frozen)]
    assert count[0] - count[1] == gone
    kept = [model, frozen, *([compact(frozen, (x,))] if density == 0.24 else [])]
    sizes = []
    for m in kept:
        save(m, tmp_path / "net")
        sizes.append(values_in(tmp_path / "net"))
    dense, sparse, *fused = sizes
    assert abs(dense - sparse - 4 * gone + bits) < 8 * len(stripes) + 8  # alignment
    assert all(size <= sparse for size in fused)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 3, num_layers=2, proj_size=2, bidirectional=True),
        nn.GRU(4, 3, bias=False, batch_first=True),
        nn.RNN(4, 3, nonlinearity="relu"),
    ],
)
def test_recurrent_layers(layer: nn.Module, tmp_path: Path) -> None:
    save(nn.Sequential(layer), tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert str(loaded.get_submodule("0")) == str(layer)
    x = torch.randn(5, 2, 4)
    with torch.inference_mode():
        assert all(map(torch.equal, tree_leaves(loaded(x)), tree_leaves(layer(x))))


class Kinds(nn.Module):
    """Operations beside those of a plain classifier, of its own names and values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.depth, self.depth_norm = nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.register_buffer("order", torch.randperm(16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.leaky_relu_(self.norm(self.first(x)), 0.1)
        y = self.depth_norm(self.depth(x.unsqueeze(1))).flatten(1, 2).index_select(1, self.order)
        z, where = self.pool(y)
        y = self.unpool(z, where, output_size=y.size()).clamp_min_(0.1).sqrt_()
        return y, z.flatten(2).max(dim=2).values, torch.topk(z.flatten(1), 3).indices


def test_operations_that_are_not_a_classifiers(tmp_path: Path) -> None:
    model, x = Kinds().eval(), torch.randn(2, 3, 5, 7)
    save(model, tmp_path / "net")
    with torch.inference_mode():
        assert all(map(torch.equal, load(tmp_path / "net")(x), model(x)))


class Conditioned(nn.Module):
    """An optional input, and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)

    def forward(self, x: Tensor, style: Tensor | None = None, times: int = 2) -> Tensor:
        x = self.conv(x) * times
        return x if style is None else x * self.gate(style)[:, :, None, None]


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_takes_the_inputs_of_its_example(count: int, tmp_path: Path) -> None:
    model, inputs = Conditioned().eval(), (torch.randn(2, 3, 5, 7), torch.randn(2, 4))[:count]
    save(model, tmp_path / "net", inputs)
    given = example_input(tmp_path / "net")
    assert given is not None
    assert [x.shape for x in given] == [x.shape for x in inputs]
    assert torch.equal(load(tmp_path / "net")(*inputs), model(*inputs))


def test_shared_modules_and_tied_weights_are_stored_once(tmp_path: Path) -> None:
    shared, first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    second.weight = first.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, first, second).eval()
    save(model, tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert [n.target for n in loaded.graph.nodes if n.op == "call_module"][::2] == ["0", "0", "4"]
    assert loaded.get_submodule("3").weight is loaded.get_submodule("4").weight
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), {"0": torch.rand(8, 3, 3) < 0.5}).to(
        dtype
    )
    save(model, tmp_path / "net")
    x = torch.randn(1, 3, 6, 6, dtype=dtype)
    assert torch.equal(load(tmp_path / "net")(x), model.eval()(x))


def test_tuned_choices_travel(frozen: nn.Module, path: Path) -> None:
    layer = next(m for m in frozen.modules() if isinstance(m, StripeConv2d))
    problem = layer._op.problem((2, layer.in_channels, 32, 32), torch.float32, torch.device("cpu"), False)
    every = [c for c in layer._op.plan("fprop", problem).candidates if c.refusal is None]
    slow_first = [plan.Candidate(c.kernel, c.config, c.predicted, 1.0 / (i + 1)) for i, c in enumerate(every)]
    try:
        plan.record(problem, "fprop", slow_first)
        save(frozen, path)
        plan.forget()
        assert plan.make_plan(problem, "fprop").chosen.measured is None
        load(path)
        chosen = plan.make_plan(problem, "fprop").chosen
        assert (chosen.kernel, chosen.config, chosen.measured) == (
            every[-1].kernel,
            every[-1].config,
            slow_first[-1].measured,
        )
    finally:
        plan.forget()


def test_every_truncation_and_every_flipped_byte_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises((ValueError, OSError)):
            load(path)
    for place in [*range(0, 64, 3), *(rng.randrange(len(whole)) for _ in range(60))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises((ValueError, OSError)):
            load(path)


def test_a_loaded_network_outlives_its_file(frozen: nn.Module, path: Path) -> None:
    """Pages of a file that somebody shortened kill the process that reads them: a child loads, it does not test."""
    program = (
        "import os, sys, torch; from stripe_kernels import load; network = load(sys.argv[1]); "
        "os.truncate(sys.argv[1], 0); torch.save(network(torch.ones(2, 3, 8, 8)), sys.argv[2])"
    )
    found = path.with_name("found")
    child = subprocess.run(
        [sys.executable, "-c", program, str(path), str(found)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    torch.testing.assert_close(torch.load(found), frozen(torch.ones(2, 3, 8, 8)))


def test_nothing_in_the_load_path_unpickles_or_reaches_out(frozen: nn.Module, path: Path) -> None:
    """CPython says so itself, to a hook that nobody can take off again: a child loads."""
    program = (
        "import sys, torch; from stripe_kernels import load\n"
        "seen = []\n"
        "def hook(event, arguments):\n"
        "    if event.startswith(('pickle.', 'marshal.loads', 'subprocess.', 'socket.', 'os.system', 'os.exec')):\n"
        "        seen.append(event)\n"
        "load(sys.argv[1])  # imports what it needs, and those read .pyc files with marshal\n"
        "sys.addaudithook(hook); load(sys.argv[1]); print(seen)\n"
        "torch.load(sys.argv[2], weights_only=False); print('pickle.find_class' in seen)\n"
    )
    torch.save(nn.ReLU(), path.with_name("pickled"))
    command = [sys.executable, "-c", program, str(path), str(path.with_name("pickled"))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.stdout.splitlines() == ["[]", "True"], child.stderr


def test_foreign_newer_missing_and_unsealed_files_say_so(path: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not written by"):
        load(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")
    with pytest.raises(OSError, match="not a file"):
        load(tmp_path)
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match="safetensors"):
        load(tmp_path / "pickle")
    with pytest.raises(ValueError, match=r"checksum"):
        load(rewritten(path, lambda graph, tensors: tensors["classifier.bias"].add_(1), seal=False))
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        load(rewritten(path, lambda graph, tensors: graph.update(format=99)))


def changes() -> dict[str, object]:
    def node(op: str) -> object:
        return lambda graph: next(n for n in graph["nodes"] if n[1] == op)

    def set_target(op: str, target: object) -> object:
        return lambda graph, tensors: node(op)(graph).__setitem__(2, target)  # type: ignore[operator]

    return {
        "a function outside the vocabulary": set_target("call_function", "os.system"),
        "getattr of anything": lambda g, t: node("call_function")(g).__setitem__(
            slice(2, 4), ["getattr", {"tuple": [1, "x"]}]
        ),  # type: ignore[operator]
        "code in a placeholder": set_target("placeholder", "x=__import__('os')"),
        "code in the name of an argument": lambda g, t: node("call_function")(g).__setitem__(
            4, {"dict": [["a=exit(), b", 1]]}
        ),  # type: ignore[operator]
        "an input whose default is a node": lambda g, t: g["nodes"].insert(
            1, ["extra", "placeholder", "extra", {"tuple": [{"node": g["nodes"][0][0]}]}, {"dict": []}]
        ),
        "a keyword as a placeholder": set_target("placeholder", "import"),
        "a module that is not there": set_target("call_module", "stem.99"),
        "an unknown kind of node": lambda g, t: g["nodes"][1].__setitem__(1, "exec"),
        "a class outside the vocabulary": lambda g, t: g["modules"]["classifier"].update({"class": "Module"}),
        "a huge layer": lambda g, t: g["modules"]["classifier"]["config"]["dict"].__setitem__(
            0, ["in_features", 10**15]
        ),
        "a skeleton of another size": lambda g, t: g["modules"]["stem.0"].update(skeleton=[1000, 3, 3]),
        "a tensor missing": lambda g, t: t.pop("classifier.weight"),
        "a tensor of another shape": lambda g, t: t.update({"classifier.weight": torch.ones(3, 3)}),
        "a use before the definition": lambda g, t: g["nodes"].reverse(),
        "no nodes": lambda g, t: g.pop("nodes"),
        "nodes of another type": lambda g, t: g.update(nodes=[[1, 2]]),
        "choices of nobody": lambda g, t: g.update(choices={"nobody": [{}]}),
    }


@pytest.mark.parametrize("what", changes())
def test_hand_made_files_are_refused(what: str, path: Path) -> None:
    with pytest.raises(ValueError, match="describes no network"):
        load(rewritten(path, changes()[what]))


def test_more_layers_than_tensors_are_not_built(tmp_path: Path) -> None:
    """A number in a file is no reason to build a thousand million modules, not even without storage."""
    save(nn.Sequential(nn.GRU(2, 3)), tmp_path / "net")

    def many(graph: Any, tensors: object) -> None:
        settings = graph["modules"]["0"]["config"]["dict"]
        settings[:] = [[k, 1000 if k == "num_layers" else v] for k, v in settings]

    with pytest.raises(ValueError, match="asks for 1000 layers but has 4 tensors"):
        load(rewritten(tmp_path / "net", many))


@pytest.mark.parametrize("depth", [250, 400, 100_000])
def test_a_description_nested_too_deep_is_refused(depth: int, path: Path) -> None:
    """Deeper than Python's compiler, what rebuilds arguments, or the JSON parser follows; it is written as text, since
    no encoder follows either."""
    with safe_open(path, "pt") as file:
        text = file.metadata()["stripe_kernels"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    graph = json.loads(text)
    graph["nodes"][-1][3] = {"tuple": ["here"]}
    text = json.dumps(graph).replace('"here"', '{"tuple": [' * depth + "1" + "]}" * depth)
    save_file(tensors, path, {"stripe_kernels": text, "sha256": files._checksum(text, tensors)})
    with pytest.raises(ValueError, match=r"describes no network|its description is not what save writes"):
        load(path)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3), nn.Linear(7, 5)], ids=lambda m: type(m).__name__)
def test_a_model_of_one_layer(layer: nn.Module, path: Path) -> None:
    model = freeze(layer, {"": torch.rand(8, 3, 3) < 0.5} if isinstance(layer, nn.Conv2d) else {})
    save(model, path)
    x, network = torch.randn(2, 3, 6, 7), load(path)
    assert torch.equal(network(x), model(x))
    assert sum(type(m) is type(model) for m in network.modules()) == 1, "stored as what it is"
    torch.testing.assert_close(compact(model, (x,))(x), model(x))


def test_a_failed_write_leaves_the_old_file(
    frozen: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(frozen, path)
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == [path]
    nowhere = path.parent / "nowhere" / "net"
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{nowhere}'") + "$"):
        save(frozen, nowhere)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.decide(x) + 1

    def decide(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class Method(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cauchy_()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Argument(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, 1j)


@pytest.mark.parametrize(
    ("kind", "reason", "line"),
    [
        (Branch, "symbolically traced variables cannot be", "return x if x.sum() > 0 else -x"),
        (Custom, "a file cannot hold the function fft_fft", "return torch.fft.fft(x).real"),
        (Method, "a file cannot hold the method cauchy_", "return x.cauchy_()"),
        (Attention, "a file cannot hold '0.attention'", "return self.attention(x, x, x)[0]"),
        (Argument, "a file cannot hold the graph argument 1j", "return torch.add(x, 1j)"),
    ],
)
def test_what_a_file_cannot_hold_is_named_with_its_line(
    kind: type[nn.Module], reason: str, line: str, tmp_path: Path
) -> None:
    """The line is the user's own, not the one of torch that raised; and there is a way out."""
    number = Path(__file__).read_text().splitlines().index(f"        {line}") + 1
    with pytest.raises(ValueError, match="freeze alone takes any network") as raised:
        save(nn.Sequential(kind()), tmp_path / "net")
    said = str(raised.value)
    assert reason in said
    assert f" at {__file__}:{number}, in " in said
    assert f"`{line}`" in said
    assert not list(tmp_path.iterdir())


def test_the_size_of_the_input_goes_with_the_file(frozen: nn.Module, path: Path) -> None:
    """Of a file without one, as of every older file, nothing is known; an optimized network knows what it was made
    on."""
    assert example_input(path) is None
    save(frozen, path, torch.randn(2, 3, 24, 20))
    (x,) = example_input(path) or ()
    assert (x.shape, x.dtype, x.count_nonzero()) == ((2, 3, 24, 20), torch.float32, 0)
    before = load(path)
    network = compact(frozen, (torch.randn(1, 3, 16, 16),))
    save(network, path)
    assert [tuple(t.shape) for t in example_input(path) or ()] == [(1, 3, 16, 16)]
    save(load(path), path)
    assert [tuple(t.shape) for t in example_input(path) or ()] == [(1, 3, 16, 16)]
    with torch.inference_mode():
        assert torch.equal(before(x), frozen(x))


@pytest.mark.parametrize("size", [[10**9, 3], [-1, 3], ["a"], 7])
def test_an_input_that_is_none_is_refused(size: object, frozen: nn.Module, path: Path) -> None:
    save(frozen, path, torch.zeros(1, 3, 8, 8))
    rewritten(path, lambda graph, tensors: graph["inputs"][0]["tuple"].__setitem__(0, size))
    for read in (load, example_input):
        with pytest.raises(ValueError, match="describes no"):
            read(path)


@pytest.mark.parametrize("name", NETS)
def test_optimized_networks_come_back_optimized(name: str, tmp_path: Path) -> None:
    _, frozen, x = masked(name, 0.24)
    network = compact(frozen, (x,))
    save(network, tmp_path / "net")
    save(frozen, tmp_path / "frozen")
    loaded, plain = load(tmp_path / "net"), load(tmp_path / "frozen")
    assert isinstance(loaded, Network)
    assert loaded.report == network.report
    with torch.inference_mode():
        for a, b in ((loaded, network), (plain, frozen)):
            assert all(map(torch.equal, tree_leaves(a(x)), tree_leaves(b(x))))
