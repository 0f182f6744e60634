"""Locating by fewer requests and pairs on the embedded model: the time, and how many hot spots are those of all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from providers.whole_job import WHOLE, Job, job_of

import pke_fast
from pke_fast.hotspots import HotSpots

ALL = 64
SELECTED = (300, 1000)  # how many hot spots


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    with job_of("smollm2", requests=ALL, config=WHOLE.replace(micro_batch_tokens=1024)) as made:
        yield made


@pytest.fixture(scope="module")
def of_all(job: Job) -> dict[int, set[tuple[int, int]]]:
    return _located(job, ALL)


@pytest.mark.benchmark(group="locating by so many requests, and as many pairs")
@pytest.mark.parametrize("count", [64, 32, 16, 8, 4])
def bench_fewer_requests(benchmark: Any, count: int, job: Job, of_all: dict[int, set[tuple[int, int]]]) -> None:
    found = benchmark.pedantic(_located, args=(job, count), rounds=1)
    for k, neurons in found.items():
        benchmark.extra_info[f"of {k} hot spots also located by {ALL}, per cent"] = 100 * len(neurons & of_all[k]) / k


def _located(job: Job, count: int) -> dict[int, set[tuple[int, int]]]:
    """(layer, neuron) of the hot spots, by how many are selected."""
    config = job.config.replace(score_requests=count, score_pairs=count)
    tracing = {"first": job.layers.start, "micro_batch_tokens": config.micro_batch_tokens}
    sides = replace(job, config=config).scored
    scores, benign = (pke_fast.trace(job.structure.model, sequences, **tracing) for sequences in sides)
    return {k: _neurons(pke_fast.select(scores, benign, k=k, window=job.config.window)) for k in SELECTED}


def _neurons(hot_spots: HotSpots) -> set[tuple[int, int]]:
    return {(layer, int(neuron)) for layer, neurons in hot_spots.by_layer().items() for neuron in neurons}
