"""The short form: pke_fast against the plain ways on the user's own machine and model, in a minute or two."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from pke_fast.bench.cases import (
    EDIT,
    STEPPERS,
    TRACERS,
    check_equal,
    check_equal_steps,
    first_layer,
    stepper,
    trace,
)
from pke_fast.bench.measuring import Spread, in_fresh_process, in_turns
from pke_fast.bench.subjects import Subject, describe, spread_neurons, subject_of
from pke_fast.loading import load_model, resolve_device
from pke_fast.versions import versions

T = TypeVar("T")
REQUESTS, MICRO_BATCH_TOKENS, K, ROUNDS = 16, 1024, 1000, 2
WINDOW = "upper half"

Advance = Callable[[str], Any]
"""Called with what is about to be done."""


def _nothing(_doing: str) -> None:
    """Progress that nobody wants to know."""


def run(
    model: str = "smollm2", device: str = "auto", dtype: str = "auto", advance: Advance = _nothing
) -> dict[str, Any]:
    """Measures tracing and an edit step, each by pke_fast and by plain code, after both were found to give the same.

    Args:
        model, device, dtype: as for `load_model`.

    Returns:
        JSON values: under ``trace`` and ``step``, by provider, `seconds` (median, low, high) and `peak_bytes` over the
        loaded model (None where it can't be told or didn't fit); under ``ratios``, pke_fast's figure over the plain
        way's; `apart`, the relative differences of the results.

    Raises:
        InputError: the model can't be used.
        PKEError: the results differ, or the plain way didn't fit into memory.
    """
    device = resolve_device(device)
    peaks = {"trace": dict.fromkeys(TRACERS[:2]), "step": dict.fromkeys(STEPPERS)}
    on_gpu = device.startswith("cuda")
    if not on_gpu:  # before the model is loaded here, so that it is in memory only once
        measured = partial(in_fresh_process, model=model, device=device, dtype=dtype)
        for provider in TRACERS[:2]:
            advance(f"memory of tracing, {provider}")
            of: dict[str, Any] = {"provider": provider, "requests": REQUESTS, "micro_batch_tokens": MICRO_BATCH_TOKENS}
            peaks["trace"][provider] = measured("pke_fast.bench.cases:trace_peak", **of)
        for provider in STEPPERS:
            advance(f"memory of an edit step, {provider}")
            peaks["step"][provider] = measured("pke_fast.bench.cases:step_peak", provider=provider, window=WINDOW, k=K)
    loaded = load_model(model, device, dtype)
    with subject_of(loaded, REQUESTS, REQUESTS) as subject:
        where = subject.structure.device
        advance("checking that all score alike")
        tracers = {name: partial(trace, name, subject, MICRO_BATCH_TOKENS) for name in TRACERS[:2]}
        found = {}
        for name, tracer in tracers.items():
            found[name], peak = _with_peak(tracer, where)
            peaks["trace"][name] = peak if on_gpu else peaks["trace"][name]
        apart = {"scores": check_equal(found["pke_fast"], found["hooks"], subject.structure.dtype, "pke_fast")}
        advance("timing trace and score")
        times = {"trace": in_turns(tracers, ROUNDS, where, warm_up=False)}
        advance("checking that both edit alike")
        neurons = spread_neurons(subject.structure, first_layer(len(subject.structure.layers), 0.5), K)
        apart["weights"] = check_equal_steps(subject, neurons, EDIT, steps=2)
        advance("timing an edit step")
        times["step"] = {}
        for name in STEPPERS:
            spread, peak = _with_peak(partial(_step_times, name, subject, neurons), where)
            times["step"][name] = spread
            peaks["step"][name] = peak if on_gpu else peaks["step"][name]
        facts = describe(subject.structure)
        tokens = subject.tokens
    jobs = {
        job: {
            name: {"seconds": dataclasses.asdict(spread), "peak_bytes": peaks[job][name]} for name, spread in of.items()
        }
        for job, of in times.items()
    }
    return {
        "model": {"name": loaded.name, "device": loaded.device, **facts},
        "requests": REQUESTS,
        "tokens": tokens,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "k": K,
        "window": WINDOW,
        **jobs,
        "ratios": {job: _ratios(list(of.values())) for job, of in jobs.items()},
        "apart": apart,
        "hardware": _hardware(where),
        "versions": versions(),
    }


def _step_times(provider: str, subject: Subject, neurons: Any) -> Spread:
    with stepper(provider, subject, neurons, EDIT) as step:
        numbers = iter(range(10**6))
        return in_turns({provider: lambda: step(next(numbers))}, ROUNDS + 1, subject.structure.device)[provider]


def _with_peak(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What a function returns; on a GPU its peak memory over what is in use, too."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    return result, int(torch.cuda.max_memory_allocated(device) - before)


def _ratios(pair: list[dict[str, Any]]) -> dict[str, float | None]:
    """pke_fast's median and peak over the plain way's; None where one of them is unknown."""
    ours, theirs = pair
    both = ours["peak_bytes"] is not None and bool(theirs["peak_bytes"])
    return {
        "time": ours["seconds"]["median"] / theirs["seconds"]["median"],
        "memory": ours["peak_bytes"] / theirs["peak_bytes"] if both else None,
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
