"""What one does with a finished run: evaluate, freeze to a file, time against its dense twin."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from iessp import checkpoint, dense
from iessp.attach import freeze, gates, skeletons
from iessp.network import Network, probe
from iessp.recipe import Recipe
from iessp.report import layer_table
from iessp.timing import EQUALITY_IMAGES, Timing, busy, compare, interleave, time_networks
from iessp.train import Trainer, assemble, count_errors, packed_from, write_results


@dataclass(frozen=True)
class Frozen:
    """A run's network as it is deployed; `model` has StripeConv2d where stripes died."""

    model: nn.Module
    network: Network
    skeletons: dict[str, Tensor]
    recipe: Recipe
    example: Tensor  # [1, C, H, W]


def load_run(path: Path) -> Frozen:
    """The network of the newest checkpoint in a run's folder, or of one checkpoint's file, on the CPU.

    Raises FileNotFoundError for a folder without one, ValueError for a file that is none.
    """
    if path.is_file():
        state = checkpoint.read(path)
        if not isinstance(state, dict) or "recipe" not in state:
            raise ValueError(f"{path} is no checkpoint of a run; --weights takes a state_dict")
    else:
        state = checkpoint.load(path / "checkpoints")
    if state is None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        runs = [*path.glob("*/checkpoints"), *path.glob("*/*/checkpoints")]  # of a demo, of `iessp reproduce`
        inside = ", ".join(str(found.parent) for found in sorted(runs, reverse=True)[:5])
        hint = f"; its runs are {inside}" if inside else ""
        raise FileNotFoundError(f"{path} holds no run: expected {path / 'checkpoints' / 'step-*.pt'}{hint}")
    recipe, images = Recipe.from_dict(state["recipe"]), state["images"]
    example = torch.zeros(1, images["channels"], images["size"], images["size"])
    model = assemble(recipe, images["classes"], example)
    network = probe(model, example)
    chosen = state["skeletons"]
    if chosen:
        model = packed_from(model, chosen)
    model.load_state_dict(state["model"])
    if gates(model):
        chosen = skeletons(model)
        model = freeze(model)
    return Frozen(model.eval(), network, chosen, recipe, example)


def thaw(model: nn.Module, fill: bool = False) -> nn.Module:
    """The dense twin of a network: torch's own layers, dense; of an optimized one the compacted graph.

    fill: put random weights in place of dead stripes, not the zeros that `stripe_kernels.optimize` would find
    and skip: a dense network to be timed, not to be compared with.
    """
    import stripe_kernels

    twin = stripe_kernels.to_dense(model)
    generator = torch.Generator().manual_seed(0)
    for conv in twin.modules() if fill else ():
        if isinstance(conv, nn.Conv2d):
            weight = conv.weight.data
            noise = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
            conv.weight.data = torch.where((weight != 0).any(1, keepdim=True), weight, noise.to(weight.dtype))
    return twin


def results(trainer: Trainer) -> dict[str, Any]:
    """Figures of a finished run, from its results.json when there is one: the test set is read once. One of another
    recipe's run, whose checkpoints were taken away, is written anew."""
    path = trainer.folder / "results.json"
    if path.exists():
        found = json.loads(path.read_text())
        if Recipe.from_dict(found["recipe"]) == trainer.recipe:
            return in_todays_words(found)
    kept, compacted = trainer.shares()
    splits, recipe = trainer.splits, trainer.recipe
    found = {
        "recipe": recipe.as_dict(),
        "images": {"train": len(splits.train), "held_out": len(splits.held_out), "test": len(splits.test)},
        "held_out_errors": count_errors(trainer.model, splits.held_out, splits),
        "test_errors": count_errors(trainer.model, splits.test, splits),
        "macs": round(kept * trainer.network.macs),
        "dense_macs": trainer.network.macs,
        "macs_kept": kept,
        "macs_kept_after_compaction": compacted,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "equality": trainer.equality,
        "train_seconds": trainer.seconds,
    }
    write_results(trainer.folder, found)
    return found


def in_todays_words(found: dict[str, Any]) -> dict[str, Any]:
    """results.json of before `dense_macs`, where `macs` meant it."""
    if "dense_macs" not in found and "macs" in found:
        found |= {"dense_macs": found["macs"], "macs": round(found["macs_kept"] * found["macs"])}
    return found


def finish(trainer: Trainer, console: Console) -> None:
    """Print what a finished run reached."""
    found = results(trainer)
    n = found["images"]["test"]
    console.print(
        f"{trainer.recipe.name}: {1 - found['test_errors'] / n:.2%} of {n} test images right "
        f"({found['test_errors']} errors), {found['macs_kept']:.2%} of {found['dense_macs'] / 1e6:.1f} M MACs kept "
        f"({found['macs_kept_after_compaction']:.2%} after compaction)",
        highlight=False,
    )
    if trainer.skeletons:
        console.print(layer_table(trainer.network, trainer.skeletons))
    console.print(f"checkpoints, log.csv and results.json are in {trainer.folder}")
    if trainer.skeletons:
        console.print(f"next: iessp freeze {trainer.folder}, iessp report {trainer.folder}", soft_wrap=True)


def checked(model: nn.Module, x: Tensor, batch: int, name: str = "frozen") -> nn.Module:
    """The network, once its outputs on x, `batch` images a call, are those of its masked dense form; RuntimeError where
    they are not."""
    equality = compare(model, thaw(model), x, batch)
    if not equality.ok:
        raise RuntimeError(f"{name} differs from its dense twin, nothing was timed: {equality}")
    return model


def contest(
    model: nn.Module,
    batch: int,
    example: Tensor,
    seconds: float,
    optimize: bool = True,
    runtimes: bool = False,
) -> dict[str, tuple[Timing, str]]:
    """Dense twin and network, as they are and optimized, in one interleaved run on `batch` images.

    The network is called "frozen", or "optimized" when it is already; everything that is dense has a name that begins
    so. With `optimize` the dense network has the same done to it as the frozen one, and competes with its norms folded
    too; with `runtimes` also in the inference runtimes that are installed. Outputs are compared first: the network's
    with the masked dense one's, RuntimeError when they differ; the others' with what they were made from, which are
    left out with a warning when they differ.
    """
    import stripe_kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *example.shape[1:], generator=generator).to(example.dtype)
    many = torch.randn(EQUALITY_IMAGES, *example.shape[1:], generator=generator).to(example.dtype)
    given = "optimized" if isinstance(model, stripe_kernels.Network) else "frozen"
    twin = thaw(model, fill=True).eval()
    mine = checked(model, many, batch, given)
    # Networks, and what each was made from.
    made: dict[str, tuple[nn.Module | None, nn.Module | None]] = {"dense": (twin, None), given: (mine, None)}
    if optimize:
        made["dense, folded"] = (dense.folded(twin), twin)
        made["dense, optimized"] = (stripe_kernels.optimize(twin, x), twin)
        if given == "frozen":
            made["frozen, optimized"] = (stripe_kernels.optimize(mine, x), mine)
    networks: dict[str, nn.Module] = {}
    for name, (network, origin) in made.items():
        if network is None:
            continue
        equality = None if origin is None else compare(network, origin, many, batch)
        if equality is None or equality.ok:
            networks[name] = network
        else:
            warnings.warn(f"{name} differs from its origin and is left out: {equality}", stacklevel=2)
    times = time_networks(networks, x, seconds, dense.runtimes(twin, x) if runtimes else {})
    return dict(sorted(times.items(), key=lambda item: not item[0].startswith("dense")))


def fastest_dense(times: dict[str, tuple[Timing, str]]) -> str:
    """The dense contestant that speed-ups are over."""
    return min((name for name in times if name.startswith("dense")), key=lambda name: times[name][0].median)


def contest_rows(times: dict[str, tuple[Timing, str]], batch: int) -> list[list[str]]:
    """Rows of the table: name, batch, time, memory format, speed-up over the fastest dense."""
    best = times[fastest_dense(times)][0].median
    return [
        [name, str(batch), str(timing), title, f"{best / timing.median:.2f}x"]
        for name, (timing, title) in times.items()
    ]


def contest_records(times: dict[str, tuple[Timing, str]], batch: int) -> list[dict[str, Any]]:
    """The same as data: network, batch, format, ms, ms_low, ms_high (quartiles), n, speed_up."""
    best = times[fastest_dense(times)][0].median
    return [
        {"network": name, "batch": batch, "format": title, "ms": t.median, "ms_low": t.low, "ms_high": t.high,
         "n": t.n, "speed_up": best / t.median}
        for name, (t, title) in times.items()
    ]  # fmt: skip


def conditions() -> str:
    """Under what the timings were taken."""
    threads = torch.get_num_threads()
    line = f"{threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, the faster memory format of each"
    warning = busy()
    return f"{line}; {warning}" if warning else line


@torch.inference_mode()
def time_layers(model: nn.Module, x: Tensor, seconds: float) -> dict[str, tuple[Timing, Timing]]:
    """Each StripeConv2d on the input it gets in a run on x: name -> (dense twin, stripes), interleaved."""
    from stripe_kernels import StripeConv2d

    layers = {name: m for name, m in model.named_modules() if isinstance(m, StripeConv2d)}
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].clone()))
        for name, layer in layers.items()
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in layers.items():
        twin = layer.to_conv2d().eval()
        calls = {"dense": partial(twin, inputs[name]), "stripes": partial(layer, inputs[name])}
        times = interleave(calls, seconds / len(layers))
        found[name] = (times["dense"], times["stripes"])
    return found
