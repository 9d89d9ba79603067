"""What the verbs do with a model; each prints for a person and returns the same as data."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stripe_kernels
from iessp import checkpoint, latency, runs
from iessp.attach import METHODS, attach, freeze, gates, nearest, settle
from iessp.budget import compacted_macs_kept, macs_kept
from iessp.cli_frame import Failure
from iessp.cli_model import Given
from iessp.cli_options import ONE_SHOT
from iessp.network import Network, probe
from iessp.progress import console
from iessp.recipe import Recipe
from iessp.report import layer_table, table
from iessp.report_page import accuracy_points
from iessp.timing import busy

TUNE_SECONDS = 0.2  # for the candidates of one layer


def prune(
    given: Given, method: str, budget: str, output: Path, exclude: list[str], pointwise: bool
) -> dict[str, Any]:
    """One shot: ranks the stripes, keeps what the budget allows, writes the frozen network."""
    if method in METHODS and method not in ONE_SHOT:
        raise ValueError(
            f"{method} learns while it trains: iessp train RECIPE --set method={method}; in one shot: "
            f"{', '.join(ONE_SHOT)}"
        )
    if method not in ONE_SHOT:
        raise ValueError(nearest("one-shot method", method, ONE_SHOT))
    if given.optimized:
        raise ValueError(f"{given.name} is optimized already: prune the network it was made from")
    model = stripe_kernels.to_dense(given.model)
    attach(model, method, example_input=given.example, exclude=exclude, pointwise=pointwise)
    settle(model, _share(model, method, budget, given))
    return _write(given, freeze(model).eval(), output)


def _share(model: nn.Module, method: str, budget: str, given: Given) -> float:
    """The budget as a share of what the gates' network counts, which a budget in milliseconds changes to time."""
    number = budget.rstrip("% ")
    network = next(iter(gates(model).values())).network
    try:
        share = float(number) / (100 if budget.endswith("%") else 1)
    except ValueError:
        milliseconds = Recipe("", method=method, budget=budget).milliseconds
        assert milliseconds is not None
        with working("timing the layers"):
            found = latency.measure(model, given.example)
        share = found.share(milliseconds, network)
        network = latency.priced(network, found)
        for gate in gates(model).values():
            gate.site, gate.network = network[gate.site.name], network
    if share == 1:
        raise ValueError(
            f"a budget of {budget} needs nothing cut of {network.macs / 1e6:.1f} M multiply-adds"
        )
    return share


def freeze_to(given: Given, output: Path) -> dict[str, Any]:
    """Takes a model's zeros out and writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stripe_kernels.UnchangedWarning)  # a Failure says it
        frozen = given.frozen
    if not any(isinstance(m, stripe_kernels.StripeConv2d) for m in frozen.modules()):
        raise Failure(
            f"no stripe of {given.name} is entirely zero, nothing to freeze: iessp prune makes some"
        )
    return _write(given, frozen, output)


def _write(given: Given, frozen: nn.Module, output: Path) -> dict[str, Any]:
    """Saves a frozen network; the table and the figures of what it keeps."""
    _save(frozen, output, given.example)
    network, live = _kept(frozen, given.example)
    console.print(layer_table(network, live))
    kept, compacted = macs_kept(network, live), compacted_macs_kept(network, live)
    console.print(
        f"{kept:.2%} of the convolutions' {network.macs / 1e6:.1f} M MACs kept ({compacted:.2%} after compaction)\n"
        f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB; stripe_kernels.load reads it, iessp bench times it",
        highlight=False,
    )
    layers = [
        {"layer": name, "live": int(s.sum()), "stripes": s.numel(), "filters": int(s.flatten(1).any(1).sum())}
        for name, s in live.items()
    ]
    return {
        "file": str(output),
        "bytes": output.stat().st_size,
        "macs": round(kept * network.macs),
        "dense_macs": network.macs,
        "macs_kept": kept,
        "macs_kept_after_compaction": compacted,
        "layers": layers,
    }


def _save(model: nn.Module, output: Path, example: Tensor) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        stripe_kernels.save(model, output, example)
    except ValueError as error:
        raise Failure(f"cannot write {output}: {error}") from error


def _kept(frozen: nn.Module, example: Tensor) -> tuple[Network, dict[str, Tensor]]:
    """The network as it would be dense, and the skeletons of its stripe layers by the dense one's names."""
    inside = frozen.body if isinstance(frozen, stripe_kernels.Network) else frozen
    live = {n: m.skeleton for n, m in inside.named_modules() if isinstance(m, stripe_kernels.StripeConv2d)}
    return probe(stripe_kernels.to_dense(frozen), example), live


def optimize(given: Given, batch: int, output: Path) -> dict[str, Any]:
    """Compacts, fuses and tunes; writes the network where that was exact and faster."""
    with (
        working("optimizing: every layer's kernels are timed, then whole networks"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", stripe_kernels.UnchangedWarning)  # the report says why
        network = stripe_kernels.optimize(given.frozen, given.images(batch))
    _save(network, output, given.example)
    with redirect_stdout(io.StringIO()):
        explanation = stripe_kernels.explain(network, given.images(batch))
    for line in explanation.summary:
        console.print(line, highlight=False, soft_wrap=True)
    kept = not isinstance(network, stripe_kernels.Network)
    console.print(
        f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB; stripe_kernels.load reads it, iessp bench times it",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return {
        "file": str(output),
        "bytes": output.stat().st_size,
        "rewritten": not kept,
        "notes": explanation.notes,
    }


def bench(given: Given, batches: list[int], seconds: float) -> dict[str, Any]:
    """Dense against stripes, as they are and optimized, one contest a batch size."""
    rows, records = [], []
    for batch in batches:
        with working(f"batch {batch}: outputs compared, then {seconds:.0f} s of timing"):
            times = runs.contest(given.frozen, batch, given.example, seconds, runtimes=True)
        rows += runs.contest_rows(times, batch)
        records += runs.contest_records(times, batch)
    columns = ["network", "batch", "ms", "format", "speed-up"]
    console.print(table("Inference, ms: median (quartiles); speed-up over the fastest dense", columns, rows))
    console.print(runs.conditions())
    return {"networks": records, "conditions": runs.conditions()}


def explain(given: Given, batch: int, measure: bool, page: Path | None) -> dict[str, Any]:
    """A table by layer, as a page too where `page` says so."""
    explanation = _explained(given, batch, measure)
    console.print(str(explanation), highlight=False, soft_wrap=True)
    if page is not None:
        _write_page(page, explanation.html(given.name))
    return explanation.as_dict()


def report(
    given: Given, batch: int, measure: bool, seconds: float, folders: list[Path], output: Path
) -> dict[str, Any]:
    """One page with everything that is known of a network."""
    accuracy_points(folders, given.folder, None)  # says before all measuring where a folder has no records
    explanation = _explained(given, batch, measure)
    networks: list[dict[str, Any]] = []
    if measure:
        with working(f"batch {batch}: whole networks, dense and stripes"):
            times = runs.contest(given.frozen, batch, given.example, seconds, runtimes=True)
            networks = runs.contest_records(times, batch)
    own = next((n["ms"] for n in networks if n["network"] in ("frozen", "optimized") and batch == 1), None)
    points = accuracy_points(folders, given.folder, own)
    _write_page(output, explanation.html(given.name, networks, points, (busy() or "") if measure else ""))
    found = {"file": str(output), "networks": networks, "runs": points, "conditions": runs.conditions()}
    return {**found, **explanation.as_dict()}


def _explained(given: Given, batch: int, measure: bool) -> Any:
    """The explanation, its own printing held back; with `measure` every layer is tuned and the roof probed."""
    model, x, roof = given.frozen, given.images(batch), None
    if measure:
        if (warning := busy()) is not None:
            console.print(warning)
        with working("timing every layer's kernels, dense included"):
            stripe_kernels.tune(model, x, seconds=TUNE_SECONDS)
            roof = stripe_kernels.Roof.probe(x.dtype, torch.get_num_threads())
    with redirect_stdout(io.StringIO()):
        return stripe_kernels.explain(model, x, roof=roof, seconds=TUNE_SECONDS if measure else 0.0)


def _write_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = page.encode()
    checkpoint.write_atomically(path, lambda file: file.write(written))
    console.print(f"wrote {path}, {len(written) / 1e3:.0f} kB; open it in a browser")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says what goes on: a spinner on a terminal, a line elsewhere."""
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
        yield
        return
    with console.status(what):
        yield
