"""Programs beside this one, each with whatever it starts in a session of its own: one that is stopped takes along what
it began (compilers, a program under compute-sanitizer), and leaves neither the GPU nor a core busy for what is timed
later."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.gpu_check.record import ROOT

_GONE = 10.0  # seconds in which a killed process goes


@dataclass(frozen=True)
class Ended:
    """code: None where it was stopped."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Program:
    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        # Files, not pipes: nobody reads while several run, and a full pipe would stop its writer.
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 -- as long as the program
        self._stays = ""
        self._start, self._over = time.perf_counter(), False
        out, err = self._files
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=out, stderr=err, text=True, start_new_session=True,
        )  # fmt: skip

    def wait(self, end: float) -> Ended:
        """Until it is over; where the clock says `end` before, it is stopped."""
        code: int | None
        try:
            code = self._process.wait(timeout=max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        texts[1] += self._stays
        return Ended(code, *texts, time.perf_counter() - self._start)

    def stop(self) -> None:
        """Ends it, and what it began."""
        if self._over:
            return
        self._over = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=_GONE)
        except subprocess.TimeoutExpired:  # in a call of the driver that does not return
            self._stays = f"process {self._process.pid} stays, killed: the driver holds it"
            print(f"gpu_check: {self._stays}", flush=True)


@contextmanager
def together(
    commands: Sequence[Sequence[str]], environment: dict[str, str] | None = None
) -> Iterator[list[Program]]:
    """All at once; whatever becomes of this process's own work, none is left behind."""
    running: list[Program] = []
    try:
        for command in commands:
            running.append(Program(command, environment))
        yield running
    finally:
        for program in running:
            program.stop()


def run(command: Sequence[str], seconds: float) -> Ended:
    end = time.perf_counter() + seconds
    with together([command]) as (program,):
        return program.wait(end)
