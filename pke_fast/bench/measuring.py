"""Times of variants that take turns, and peak memory in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from pke_fast.errors import InputError, PKEError
from pke_fast.stages import PeakMemory

T = TypeVar("T")
SHOWN = 2000  # characters of what a failed process said
RETURNED = 2**16  # bytes of a block from which on it is returned at once, where memory is measured


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a function returns, and the seconds until the device was done with it."""
    _wait(device)
    start = time.perf_counter()
    result = run()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, warm_up: bool = True
) -> dict[str, Spread]:
    """Seconds of each variant. They take turns, each round in another order: a machine's moods hit all alike."""
    names = list(runs)
    if warm_up:
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed(runs[name], device)[1])
    return {name: Spread.of(values) for name, values in seconds.items()}


def peak_over_now(run: Callable[[], T], device: str) -> tuple[T, int | None]:
    """What a function returns, and its peak memory over what was in use before, in bytes; None where it can't be told.

    On a CPU this is resident memory, which only a process made by `in_fresh_process` gives back at once.
    """
    memory = PeakMemory(device)
    memory.reset()
    before = memory.current()
    result = run()
    peak = memory.peak()
    return result, None if peak is None or before is None else max(0, peak - before)


def in_fresh_process(function: str, *, beside: Path | None = None, tight: bool = True, **arguments: Any) -> Any:
    """Calls ``module:function`` with JSON values in a process of its own, and returns what it returns, JSON too.

    Args:
        beside: a folder that the process finds modules in, too.
        tight: freed memory goes back to the system at once, as a measurement of memory needs and one of time doesn't.

    Raises:
        PKEError: the process failed; it says what it said. An error of pke_fast's in there is raised here as it was.
    """
    environment = dict(os.environ)
    if tight:  # glibc keeps what is freed for later; told to return it, resident memory is what is in use
        environment["MALLOC_MMAP_THRESHOLD_"] = str(RETURNED)
    if beside is not None:
        paths = [str(beside), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pke_fast.bench.measuring", function, json.dumps(arguments), str(into)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode or not into.exists():
            raise PKEError(f"{function} failed in a process of its own", got=done.stderr.strip()[-SHOWN:])
        found = json.loads(into.read_text(encoding="utf-8"))
    if "error" in found:
        raise (InputError if found["input"] else PKEError)(**found["error"])
    return found["result"]


def _serve(function: str, arguments: str, into: str) -> None:
    module, name = function.split(":")
    try:
        found = {"result": getattr(import_module(module), name)(**json.loads(arguments))}
    except PKEError as error:
        parts = {"what": error.what, "expected": error.expected, "got": error.got, "do": error.do}
        found = {"error": parts, "input": isinstance(error, InputError)}
    Path(into).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
