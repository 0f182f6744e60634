"""Dense masked Adam over the located layers, the neurons located by plain hooks: the published form of a front end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pke_fast
from pke_fast.bench.dense_adam import DenseAdam
from pke_fast.bench.hooks import trace_by_hooks
from pke_fast.bench.plain_loss import PlainLoss
from pke_fast.encoding import Encoded
from pke_fast.scoring import Scores
from providers.whole_job import Job

LRS = (1e-3, 2e-3, 4e-3, 8e-3)


def edit(job: Job, lr: float, after: Callable[[int], None]) -> None:
    structure, config = job.structure, job.config
    scores, benign = (_scores(job, sequences) for sequences in job.scored)
    hot_spots = pke_fast.select(scores, benign, k=config.k, window=config.window)
    loss = PlainLoss(structure, job.requests, job.locality, config, pad_id=job.pad_id)
    adam = DenseAdam(structure, hot_spots.by_layer(), lr)
    try:
        for number in count():
            with adam.gradients():
                loss.backward(number)
            adam.step()
            after(1)
    finally:
        adam.restore()


def _scores(job: Job, sequences: list[Encoded]) -> Scores:
    tokens = job.config.micro_batch_tokens
    change, path = trace_by_hooks(job.structure, sequences, pad_id=job.pad_id, micro_batch_tokens=tokens)
    return Scores(change, path, path.new_zeros(path.shape), len(sequences))
