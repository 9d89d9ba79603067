"""Frozen networks in other tools: the Hugging Face Hub's folders, timm's models, a server of HTTP requests."""

from __future__ import annotations

import http.client
import io
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples import serve
from stripe_kernels import StripeConv2d, freeze, load, save
from stripe_kernels.compile.optimize import compact
from tests.compile.test_compact import assert_same
from tests.interop import needed

ROOT = Path(__file__).parents[2]


def pruned() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(216, 4),
    ).eval()
    for conv in (model[0], model[3]):
        conv.weight.data *= torch.rand(conv.out_channels, 1, 3, 3) < 0.4
    return freeze(model)


class TestHub:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("huggingface_hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @pytest.mark.parametrize("optimized", [False, True])
    def test_a_folder_comes_back(self, tmp_path: Path, optimized: bool) -> None:
        from stripe_kernels.hub import HubModel

        frozen, x = pruned(), torch.randn(2, 3, 8, 8)
        network = compact(frozen, (x,)) if optimized else frozen
        HubModel(network, x).save_pretrained(tmp_path / "model")
        assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "model.safetensors"]
        assert "library_name: stripe-kernels" in (tmp_path / "model/README.md").read_text()
        again = HubModel.from_pretrained(tmp_path / "model")
        assert isinstance(again, HubModel)
        with torch.inference_mode():
            assert torch.equal(again(x), network(x))
        assert torch.equal(again.example_input[0], torch.zeros_like(x))
        load(tmp_path / "model/model.safetensors")

    def test_what_is_pushed_is_the_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As far as the Hub's client: its calls that would use the network are taken by the test."""
        from huggingface_hub import HfApi

        from stripe_kernels.hub import HubModel

        sent: dict[str, list[str]] = {}

        def create_repo(self: HfApi, repo_id: str, **kwargs: object) -> object:
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **kwargs: object) -> str:
            sent[repo_id] = sorted(p.name for p in Path(folder_path).iterdir())
            return "done"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        HubModel(pruned()).push_to_hub("someone/pruned")
        assert sent == {"someone/pruned": ["README.md", "model.safetensors"]}

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        from stripe_kernels.hub import HubModel

        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "model.safetensors"))):
            HubModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mobilenetv2_050", "regnetx_002", "convnext_atto"])
def test_timm(name: str, tmp_path: Path) -> None:
    timm = needed("timm")
    model = timm.create_model(name, num_classes=100).eval()
    x = torch.randn(4, 3, 64, 64)
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            k, _, r, s = module.weight.shape
            module.weight.data *= torch.rand(k, 1, r, s) < 0.5
            found += 1
    frozen = freeze(model)
    assert sum(isinstance(m, StripeConv2d) for m in frozen.modules()) == found > 0
    assert_same(model, frozen, [x])
    assert_same(model, compact(frozen, (x,)), [x])
    save(frozen, tmp_path / "net.safetensors")
    assert_same(model, load(tmp_path / "net.safetensors"), [x])


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm with its activation inside and a check of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D)")
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
        ).relu()


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_of_the_models_own_is_folded_and_saved(affine: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8, eps=0.1, affine=affine), nn.Conv2d(8, 4, 3)).train()
    x = torch.randn(2, 3, 9, 7)
    for _ in range(3):
        model[1].running_mean += 1  # something to fold
        model[1].running_var *= 1.5
    model.eval()[2].weight.data[:, :, 0] = 0
    frozen = freeze(model)
    network = compact(frozen, (x,))
    assert not any(node.target is F.batch_norm for node in network.body.graph.nodes)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    save(frozen, tmp_path / "net.safetensors")
    for other in (frozen, network, load(tmp_path / "net.safetensors")):
        assert_same(model, other, [x, torch.randn(5, 3, 8, 8)])


@pytest.fixture
def address() -> Iterator[tuple[str, nn.Module]]:
    network = pruned()
    with serve.server(network, (3, 8, 8), port=0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_address[1]}", network
        finally:
            serving.shutdown()
            thread.join()


def post(url: str, content: bytes) -> np.ndarray:
    with urllib.request.urlopen(urllib.request.Request(url, data=content)) as answer:
        return np.load(io.BytesIO(answer.read()))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


@pytest.mark.parametrize(("length", "code"), [("-1", 400), ("many", 400), (str(serve.LARGEST + 1), 413)])
def test_a_server_answers_a_wrong_length(address: tuple[str, nn.Module], length: str, code: int) -> None:
    connection = http.client.HTTPConnection(address[0].removeprefix("http://"))
    connection.request("POST", "/", headers={"Content-Length": length})
    assert connection.getresponse().status == code


def test_a_server_answers_real_requests(address: tuple[str, nn.Module]) -> None:
    url, network = address
    for n in (1, 5):
        x = torch.randn(n, 3, 8, 8)
        with torch.inference_mode():
            np.testing.assert_array_equal(post(url, npy(x.numpy())), network(x).numpy())
    with urllib.request.urlopen(url) as answer:
        assert b"float32 [N, 3, 8, 8]" in answer.read()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"hello", "pickle|magic|file"),
        (b"", "data|file"),
        (npy(np.zeros((1, 3, 8, 9), np.float32)), r"got float32 \[1, 3, 8, 9\]"),
        (npy(np.zeros((0, 3, 8, 8), np.float32)), r"got float32 \[0, 3, 8, 8\]"),
        (npy(np.zeros((1, 3, 8, 8))), "got float64"),
        (npz(np.zeros((1, 3, 8, 8), np.float32)), "dtype"),
        (
            npy(np.zeros((1, 3, 8, 8), np.float32)).replace(b"(1, 3, 8, 8), }     ", b"(9999999999,3,8,8),}"),
            "allocate",
        ),
    ],
)
def test_a_server_says_what_is_wrong_with_a_request(
    address: tuple[str, nn.Module], body: bytes, text: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as failed:
        post(address[0], body)
    assert failed.value.code == 400
    assert re.search(text, failed.value.read().decode())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gone.safetensors"], "serve.py: error: gone.safetensors is not a file"),
        (
            ["gone.safetensors", "--input", "3 by 8"],
            "serve.py: error: argument --input: invalid size value: '3 by 8'",
        ),
    ],
)
def test_the_server_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_the_server_as_a_program(tmp_path: Path) -> None:
    save(pruned(), tmp_path / "net.safetensors")
    command = [
        sys.executable,
        ROOT / "examples/serve.py",
        tmp_path / "net.safetensors",
        "--input",
        "3x8x8",
        "--port=0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            x = np.zeros((2, 3, 8, 8), np.float32)
            assert post(process.stdout.readline().strip(), npy(x)).shape == (2, 4)
        finally:
            process.terminate()
