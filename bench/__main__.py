"""python -m bench: times layers and networks against every dense contestant; see bench/README.md."""

from __future__ import annotations

import math
import shlex
import sys
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from bench import layers, networks, skeletons, table
from bench.chart import draw
from bench.contestants import Contestant, contestants, kernel_names
from bench.job import PASSES, Job
from bench.machine import Machine, keep_memory
from bench.records import Writer
from bench.run import missing, run_layer
from stripe_kernels import FilterSkeleton, Roof

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Learned = dict[str, dict[str, FilterSkeleton]]  # network -> module -> skeleton


def words(text: str) -> list[str]:
    """Comma-separated words; "none" is no word."""
    return [] if text == "none" else [word.strip() for word in text.split(",") if word.strip()]


def among(text: str, known: tuple[str, ...] | list[str], what: str) -> list[str]:
    """Comma-separated words, each one of `known`."""
    found = words(text)
    unknown = [word for word in found if word not in known]
    if unknown:
        raise typer.BadParameter(f"{what} {', '.join(unknown)}; there are {', '.join(known)}")
    return found


def numbers(text: str, kind: type[int] | type[float], what: str, most: float = math.inf) -> list[float]:
    """Comma-separated positive numbers, none above `most`."""
    try:
        found = [kind(word) for word in words(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{what} are numbers with commas between, got {text!r}") from error
    if any(not 0 < n <= most for n in found):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise typer.BadParameter(f"{what} must be positive{limit}, got {text!r}")
    return found


def sources_of(
    layer: layers.Layer, densities: list[float], sources: list[str], learned: Learned
) -> list[tuple[str, FilterSkeleton]]:
    """(source, skeleton) for every generator and density; learned skeletons have the density they have."""
    made = [
        (source, skeletons.GENERATORS[source](layer.filter_size, d, f"{layer.name} {d}"))
        for source, d in product(sources, densities)
        if source in skeletons.GENERATORS and (d < 1 or source == "iid")
    ]
    given = learned.get(layer.network, {})
    return made + [(f"learned {m}", given[m]) for m in layer.modules if m in given]


def learned_from(text: str) -> Learned:
    """NETWORK=FILE pairs with commas between."""
    found: Learned = {}
    for pair in words(text):
        name, _, path = pair.partition("=")
        if name not in layers.NETWORKS or not path:
            raise typer.BadParameter(f"--learned takes NETWORK=FILE, got {pair!r}")
        found[name] = skeletons.learned(Path(path))
    return found


@app.command()
def bench(
    full: Annotated[
        bool, typer.Option("--full", help="Every layer, batch, density and generator: hours.")
    ] = False,
    layer: Annotated[str, typer.Option("--layers", help="Shell patterns of names (--list), or none.")] = "",
    batch: Annotated[str, typer.Option(help="Of layers and networks, e.g. 1,8,32,128.")] = "",
    density: Annotated[str, typer.Option(help="Of layers, e.g. 1,.75,.5,.3,.24,.1,.05.")] = "",
    generator: Annotated[str, typer.Option("--skeletons", help="iid,dead; see --learned.")] = "",
    learned: Annotated[
        str, typer.Option(help="Learned skeletons: NETWORK=FILE, saved by stripe_kernels.")
    ] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, e.g. 1,2; default: all cores.")] = "",
    passes: Annotated[str, typer.Option(help=f"Of layers: {','.join(PASSES)}.")] = "fprop",
    dtype: Annotated[str, typer.Option(help=f"Of layers: {', '.join(DTYPES)}.")] = "float32",
    kernels: Annotated[
        str, typer.Option(help="By name: best (of this machine), all, none, or names.")
    ] = "best",
    network: Annotated[
        str, typer.Option("--networks", help=f"{','.join(layers.NETWORKS)}, or none.")
    ] = "vgg16",
    kept: Annotated[str, typer.Option(help="Of networks: the shares of stripes kept.")] = str(
        networks.DENSITY
    ),
    step: Annotated[bool, typer.Option(help="Time the networks' training step too.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile takes part; slow to start.")
    ] = False,
    tuned: Annotated[bool, typer.Option(help="Tune each layer and time the choice.")] = False,
    seconds: Annotated[float, typer.Option(help="Time spent on a comparison of layers.")] = 0.6,
    out: Annotated[Path | None, typer.Option(help="Write OUT.csv, .json, .png and .svg.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the names of the layers and stop.")] = False,
) -> None:
    """Times stripe convolutions against the fastest dense contestant of this machine."""
    console = table.console()
    if show:
        console.print("\n".join(layers.layers()), highlight=False)
        return
    given = learned_from(learned)
    counts = [int(t) for t in numbers(threads, int, "threads")] or [torch.get_num_threads()]
    batches = [int(n) for n in numbers(batch, int, "batch sizes")]
    densities = numbers(density, float, "densities", most=1) or list(
        layers.DENSITIES if full else layers.QUICK_DENSITIES
    )
    made = among(generator, list(skeletons.GENERATORS), "skeletons") or ["iid", *(["dead"] if full else [])]
    (kind,) = among(dtype, list(DTYPES), "dtype")
    try:
        chosen = [] if layer == "none" else layers.select(words(layer) or (["*"] if full else layers.QUICK))
        entered = contestants(kernel_names(kernels), compiled)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    jobs = [
        Job(found, n, live, source, which, DTYPES[kind], t)  # type: ignore[arg-type]
        for which, t, found in product(among(passes, PASSES, "passes"), counts, chosen)
        for n in batches or (layers.BATCHES if full else layers.QUICK_BATCHES)
        for source, live in sources_of(found, densities, made, given)
    ]
    whole = [
        networks.NetworkJob(name, n, source, which, t, share, given[name] if source == "learned" else None)
        for name in among(network, list(layers.NETWORKS), "networks")
        for which, sizes in networks.workloads(batches, step).items()
        for source in [*made, *(["learned"] if name in given else [])]
        for share in (numbers(kept, float, "shares", most=1) if source != "learned" else [1.0])
        for n, t in product(sizes, counts)
    ]
    keep_memory()
    machine = Machine.look()
    console.print(f"{machine}\n{machine.load_text()}", highlight=False)
    prefix = out or Path("runs/bench") / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    writer = Writer(prefix, machine, shlex.join(["python", "-m", "bench", *sys.argv[1:]]))
    try:
        _layers(jobs, entered, DTYPES[kind], seconds, tuned, writer, console)
        _networks(whole, 4 * seconds, compiled, writer, console)
    finally:
        writer.close()
        _report(writer, console)


def _layers(
    jobs: list[Job],
    entered: dict[str, Contestant],
    dtype: torch.dtype,
    seconds: float,
    tuned: bool,
    writer: Writer,
    console: Console,
) -> None:
    roofs = {t: Roof.probe(dtype, t) for t in dict.fromkeys(job.threads for job in jobs)}
    writer.roofs += roofs.values()
    console.print("\n".join(map(str, roofs.values())), highlight=False)
    with Progress(console=console, transient=True) as progress:
        for _ in progress.track(range(len(jobs)), description=f"{len(jobs)} comparisons of layers"):
            job = jobs.pop(0)  # its tensors go with it
            writer.add(run_layer(job, entered, roofs[job.threads], seconds, tuned))


def _networks(
    jobs: list[networks.NetworkJob], seconds: float, compiled: bool, writer: Writer, console: Console
) -> None:
    with Progress(console=console, transient=True) as progress:
        for _ in progress.track(range(len(jobs)), description=f"{len(jobs)} comparisons of networks"):
            writer.add(networks.run_network(jobs.pop(0), seconds, compiled))


def _report(writer: Writer, console: Console) -> None:
    rows = [row for row in writer.rows if row.which in PASSES]
    nets = [row for row in writer.rows if row.which not in PASSES]
    for found in table.layer_tables(rows):
        console.print(found)
    if rows:
        console.print(table.LEGEND, style="dim", highlight=False)
    if nets:
        console.print(table.network_table(nets))
    for name, status in missing(writer.rows).items():
        console.print(f"not timed: {name}: {status}", highlight=False, soft_wrap=True)
    for row in writer.rows:
        if row.status.startswith("wrong"):
            what = f"{row.contestant}, {row.what}, {row.which}, batch {row.batch}, d {row.density:.2f}"
            console.print(f"[red]{what}: {row.status}[/]", highlight=False, soft_wrap=True)
    roofs = "; ".join(str(roof) for roof in writer.roofs)
    charts = draw(rows, writer.prefix, f"{writer.machine}\n{roofs}")
    for path in (writer.prefix.with_suffix(".csv"), writer.prefix.with_suffix(".json"), *charts):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    app()
