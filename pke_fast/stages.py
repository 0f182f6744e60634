"""Stages of a job: progress with the time left on the terminal; seconds and peak memory of each, for the report."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Stage:
    """What one stage cost.

    Attributes:
        name: what was being done.
        seconds: wall time.
        peak_bytes: the highest memory while it ran, in bytes: resident memory of the process on a CPU, memory
            allocated by torch on a GPU; None where the system can't tell.
        over_bytes: ``peak_bytes`` less the memory in use when the job began (the loaded model), never negative.
    """

    name: str
    seconds: float
    peak_bytes: int | None
    over_bytes: int | None


class PeakMemory:
    """The highest memory in use since `reset`, on the device that does the work."""

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device.startswith("cuda")
        self.device = device

    def reset(self) -> None:
        """Begins anew; what the C library kept of freed memory goes back to the system first, where it can."""
        if self.cuda:
            import torch

            torch.cuda.init()  # a model in the host's memory hasn't
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with suppress(AttributeError):  # musl has none
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):  # a locked-down container: the mark then covers all so far, still an upper bound
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark (proc(5))

    def peak(self) -> int | None:
        if self.cuda:
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return _status_bytes("VmHWM")

    def current(self) -> int | None:
        if self.cuda:
            import torch

            return int(torch.cuda.memory_allocated(self.device))
        return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


@dataclass
class Stages:
    """Runs the stages of a job one after another.

    Args:
        device: where the work is done; decides whose memory is measured.
        show: draw progress bars on standard error. None: only where it is a terminal.
    """

    device: str = "cpu"
    show: bool | None = None
    done: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._memory = PeakMemory(self.device)
        self._base = self._memory.current()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Runs one stage. Yields a function to call with the number of finished units, of `total` in all."""
        self._memory.reset()
        start = time.perf_counter()
        try:
            with _bar(name, total, self.show) as advance:
                yield advance
        finally:
            peak = self._memory.peak()
            over = None if peak is None or self._base is None else max(0, peak - self._base)
            self.done.append(Stage(name, time.perf_counter() - start, peak, over))


@contextmanager
def _bar(name: str, total: int | None, show: bool | None) -> Iterator[Advance]:
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda n: progress.advance(task, n)
        if total:
            progress.update(task, completed=total)
