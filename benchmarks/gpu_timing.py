"""How gpu_kernels.py times: events, CUDA graphs where calls are short, cold caches, variants round by round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GRAPHS_BELOW_MS = 0.1  # shorter calls are replayed as a graph, or the time between launches would be measured
COLD = 2  # times the L2 cache that the input sets take together, so that none is still there when its turn comes
MOST_SETS = 128
AHEAD_CYCLES = 2_000_000  # about 1 ms that the card waits before each sample, while the host queues what is timed

Pass = Callable[[], None]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the 20th, 50th and 80th percentile of the samples."""

    y20: float
    y50: float
    y80: float


def quantiles(samples: list[float]) -> Times:
    values = torch.tensor(samples, dtype=torch.float64)
    return Times(*values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


class CpuTimer:
    """Wall-clock time, to try the script without a GPU: its figures tell nothing about one."""

    device = torch.device("cpu")

    def sets_for(self, bytes_of_one: int) -> int:
        return 2

    def sample(self, run: Pass) -> Callable[[], float]:
        start = time.perf_counter()
        run()
        taken = (time.perf_counter() - start) * 1e3
        return lambda: taken

    def as_graph(self, run: Pass, warm_up: Pass) -> Pass | None:
        return None

    def wait(self) -> None:
        pass

    def peak_extra(self, run: Callable[[], Any]) -> int | None:
        return None


class CudaTimer:
    """Device time between CUDA events."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def sets_for(self, bytes_of_one: int) -> int:
        """How many input sets of that size are needed for a cold cache."""
        return min(MOST_SETS, max(1, math.ceil(COLD * self.cache_bytes / max(1, bytes_of_one))))

    def sample(self, run: Pass) -> Callable[[], float]:
        """Queues one pass; what is returned gives its time once the card has done it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        run()
        end.record()
        return lambda: float(start.elapsed_time(end))

    def as_graph(self, run: Pass, warm_up: Pass) -> Pass | None:
        """The pass as a CUDA graph's replay; warmed up on another stream first, as capturing asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def wait(self) -> None:
        torch.cuda.synchronize()

    def peak_extra(self, run: Callable[[], Any]) -> int | None:
        """Most bytes that a call takes on the card over what there is before it, its results included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before


Timer = CpuTimer | CudaTimer


def time_all(
    timer: Timer, runs: dict[str, Callable[..., Any]], sets: list[tuple[Any, ...]], rounds: int, waits: tuple[str, ...]
) -> dict[str, Times]:
    """Times of every variant on the same input sets, one sample of each a round, each time another one first.

    Args:
        waits: the variants that wait for the card. If one variant is short, all but these are replayed as graphs.
    """
    passes = {name: _pass(run, sets) for name, run in runs.items()}
    for each in passes.values():  # warm-up
        each()
    timer.wait()
    if min(_estimate(timer, _pass(run, sets[:1])) for run in runs.values()) < GRAPHS_BELOW_MS:
        for name in passes.keys() - set(waits):
            passes[name] = timer.as_graph(passes[name], _pass(runs[name], sets[:1])) or passes[name]
    samples: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for turn in range(rounds):
        at = turn % len(names)
        reading = {name: timer.sample(passes[name]) for name in names[at:] + names[:at]}
        timer.wait()
        for name, read in reading.items():
            samples[name].append(read() / len(sets))
    return {name: quantiles(taken) for name, taken in samples.items()}


def _pass(run: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Pass:
    def once() -> None:
        for inputs in sets:
            run(*inputs)

    return once


def _estimate(timer: Timer, run: Pass) -> float:
    """Milliseconds of one call, queued while the card still waits; queueing many takes the host longer than that."""
    readings = []
    for _ in range(3):
        readings.append(timer.sample(run))
        timer.wait()
    return sorted(read() for read in readings)[1]
