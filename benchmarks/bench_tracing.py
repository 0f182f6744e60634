"""Trace and score on the embedded model by every tool that does it, at the same micro-batch.

All score the same requests in the same run, in turns; the scores are compared with plain hooks' first. Memory is
measured in a process of its own for every case: the peak of resident memory over what is in use once the model is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from providers import TRACERS

from pke_fast.bench.cases import check_equal
from pke_fast.bench.measuring import in_fresh_process, peak_over_now
from pke_fast.bench.subjects import Subject, loaded_subject

HERE = Path(__file__).resolve().parent
MICRO_BATCH_TOKENS = 1024
TRUTH = "hooks"
REQUESTS = (16, 64)  # by which memory is seen to be flat; up to 512 in grid.py
GROWTH = 0.05  # of the peak, at most, from few requests to many


@pytest.fixture(scope="module")
def sixteen() -> Iterator[Subject]:
    with loaded_subject("smollm2", 16) as subject:
        yield subject


@pytest.fixture(scope="module")
def truth(sixteen: Subject) -> Any:
    return TRACERS[TRUTH].load().trace(sixteen, MICRO_BATCH_TOKENS)


@pytest.mark.benchmark(group="trace and score, 16 requests")
@pytest.mark.parametrize("provider", TRACERS)
def bench_trace_and_score(benchmark: Any, provider: str, sixteen: Subject, truth: Any) -> None:
    if TRACERS[provider].missing:
        pytest.skip(TRACERS[provider].missing)
    trace = TRACERS[provider].load().trace
    check_equal(trace(sixteen, MICRO_BATCH_TOKENS), truth, torch.float32, provider)
    peak = in_fresh_process("bench_tracing:peak", beside=HERE, provider=provider, requests=16)
    benchmark.extra_info["peak MiB over the model"] = peak / 2**20
    benchmark.extra_info["tokens"] = sixteen.tokens
    benchmark.pedantic(trace, args=(sixteen, MICRO_BATCH_TOKENS), rounds=3, warmup_rounds=0)


@pytest.mark.benchmark(group="memory against requests")
def bench_memory_is_flat(benchmark: Any) -> None:
    def median_peak(count: int) -> int:
        measure = partial(in_fresh_process, "bench_tracing:peak", beside=HERE, provider="pke_fast", requests=count)
        return sorted(measure() for _ in range(3))[1]

    few, many = benchmark.pedantic(lambda: [median_peak(count) for count in REQUESTS], rounds=1)
    for count, taken in zip(REQUESTS, (few, many), strict=True):
        benchmark.extra_info[f"peak MiB over the model, {count} requests"] = taken / 2**20
    assert many <= (1 + GROWTH) * few


def peak(provider: str, requests: int) -> int | None:
    """Bytes over the loaded model; for a process of its own."""
    trace = TRACERS[provider].load().trace
    with loaded_subject("smollm2", requests) as subject:
        return peak_over_now(lambda: trace(subject, MICRO_BATCH_TOKENS), "cpu")[1]
