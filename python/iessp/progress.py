"""What a person sees while a run goes on, and how Ctrl-C ends it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iessp import ranks
from iessp.train import Step, Trainer

console = Console()
if not console.is_terminal:
    console.width = 120  # a log file has no width; 80 columns would break the tables


@contextmanager
def progress_bar(title: str, every: int) -> Iterator[Callable[[Step], None]]:
    """A bar with loss, lambda, R, target and density; where output is no terminal, a line every `every` steps."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, TextColumn("{task.fields[state]}"), console=console, transient=False) as bar:
        task = bar.add_task(title, total=None, state="")
        loss = 0.0

        def report(step: Step) -> None:
            nonlocal loss
            loss = step.task_loss if loss == 0.0 else 0.9 * loss + 0.1 * step.task_loss
            state = f"loss {loss:.3f}"
            if step.phase == "learn":
                state += f"  λ {step.pressure:.2g}  R {step.share_soft:.1%} soft"
                state += f" {step.share_hard:.1%} hard -> {step.target:.1%}"
                state += f"  {step.density:.1%} of stripes"
            elif step.phase in ("settled", "packed"):
                state += f"  {step.phase}, {step.share_hard:.1%} of MACs, {step.density:.1%} of stripes"
            bar.update(task, completed=step.step, total=step.steps, state=state)
            if not console.is_terminal and (step.step % every == 0 or step.step == step.steps):
                console.print(f"{title}  {step.step}/{step.steps}  {state}", highlight=False)

        yield report


def train_with_bar(trainer: Trainer, title: str, tensorboard: bool = False) -> None:
    """Run a trainer to its end with a progress bar; Ctrl-C raises Interrupted."""
    if trainer.step == trainer.steps:
        console.print(f"{title}: {trainer.steps} steps done before, in {trainer.folder}")
        return
    if ranks.mine() != 0:
        with stop_on_interrupt() as stop:
            trainer.run(stop=stop)
        return
    with progress_bar(title, every=trainer.per_epoch) as report, stop_on_interrupt() as stop:
        if not tensorboard:
            trainer.run(report, stop)
            return
        with tensorboard_writer(trainer.folder / "tensorboard", trainer.step) as write:

            def both(step: Step) -> None:
                report(step)
                write(step)

            trainer.run(both, stop)


@contextmanager
def tensorboard_writer(folder: Path, step: int) -> Iterator[Callable[[Step], None]]:
    """Log every number of a step; what was logged after `step` by a run that was killed is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step + 1) as writer:

        def write(step: Step) -> None:
            for name, value in asdict(step).items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, step.step)

        yield write


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the run to stop after its step, a second one stops at once."""
    asked = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping after this step, to leave a checkpoint (Ctrl-C again: at once)")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
