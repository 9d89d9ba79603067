"""The machine line of a record: what ran, and whether anything else ran beside it."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import stripe_kernels

VERSIONS = ("torch", "numpy", "onnxruntime", "openvino")  # beside our own
QUIET = 0.15  # cores that other processes may use before a timing counts as disturbed
_STAT = Path("/proc/stat")


def cpu_model() -> str:
    """The processor's name and the widest vectors torch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def keep_memory() -> None:
    """Tells glibc's allocator to keep what it has, for every contestant of this process.

    By default it hands large activations back to the kernel and gets them anew, page by page, now and then:
    a training step of VGG-16 at batch 64 took 190 to 270 ms for that reason alone. Elsewhere than on glibc
    nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checked-out commit, "+changes" where tracked files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


class OtherWork:
    """Cores kept busy by other processes and by the hypervisor since construction; None where that cannot
    be read.

    All ticks of /proc/stat that are not idle, less this process's own: it sees at once what the load average
    tells a minute late.
    """

    def __init__(self) -> None:
        self._busy, self._own, self._time = _busy_seconds(), time.process_time(), time.perf_counter()

    def cores(self) -> float | None:
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        wall = time.perf_counter() - self._time
        return max(0.0, busy - self._busy - (time.process_time() - self._own)) / wall


def _busy_seconds() -> float | None:
    if not _STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, _STAT.read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Machine:
    """One line beside every record. `load`: (load average of a minute, cores busy with other work)."""

    cpu: str
    cores: int
    system: str
    python: str
    versions: dict[str, str | None]
    commit: str | None
    date: str
    load: tuple[float, float | None]

    @classmethod
    def look(cls, seconds: float = 0.5) -> Machine:
        """Reads everything; idles for `seconds` to see what else runs."""
        other = OtherWork()
        time.sleep(seconds)
        return cls(
            cpu_model(), os.cpu_count() or 1, f"{platform.system()} {platform.machine()}",
            platform.python_version(), {"stripe_kernels": stripe_kernels.__version__} | {name:
            _version(name) for name in VERSIONS}, commit(),
            datetime.now(timezone.utc).isoformat(timespec="seconds"), (os.getloadavg()[0], other.cores()),
        )  # fmt: skip

    @property
    def quiet(self) -> bool:
        """Whether nothing worth mentioning ran beside the benchmark when it started."""
        minute, busy = self.load
        return busy < QUIET if busy is not None else minute < 0.5

    def __str__(self) -> str:
        versions = [f"{name} {v or 'absent'}" for name, v in self.versions.items()]
        return ", ".join(
            [
                self.cpu,
                f"{self.cores} cores",
                self.system,
                f"Python {self.python}",
                *versions,
                f"commit {self.commit}",
            ]
        )

    def load_text(self) -> str:
        """What the look at the load found."""
        minute, busy = self.load
        seen = (
            "other work unknown" if busy is None else f"{busy:.2f} of {self.cores} cores busy with other work"
        )
        verdict = "quiet" if self.quiet else "NOT QUIET: timings are disturbed"
        return f"{seen}, load average {minute:.2f}: {verdict}"

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "quiet": self.quiet}
