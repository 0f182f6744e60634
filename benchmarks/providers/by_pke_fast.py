"""pke_fast by its functions for other front ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pke_fast
from pke_fast.bench import cases
from providers.whole_job import Job

LRS = (1e-3, 2e-3, 4e-3, 8e-3)

trace = partial(cases.trace, "pke_fast")


def edit(job: Job, lr: float, after: Callable[[int], None]) -> None:
    """Trace, select, update."""
    config, model = job.config, job.structure.model
    tracing = {"first": job.layers.start, "micro_batch_tokens": config.micro_batch_tokens}
    scores, benign = (pke_fast.trace(model, sequences, **tracing) for sequences in job.scored)
    hot_spots = pke_fast.select(scores, benign, k=config.k, window=config.window)
    settings = {**config.as_dict(), "lr": lr, "num_steps": 10_000, "stop_loss": 0.0}
    pke_fast.update(model, hot_spots, job.requests, job.locality, advance=after, **settings)
