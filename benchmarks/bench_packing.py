"""Packing the shipped prompts into micro-batches: how long that takes, and how much of what runs is padding, beside as
few batches as can be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from pke_fast import batches, shipped
from pke_fast.batches import packing
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded, PromptEncoder
from pke_fast.loading import context_length, load_outline

DRAWS = 20  # minibatches of each kind
MINIBATCHES = {"scoring 512 requests": 512, "a step's 16 requests": 16, "a step's 48 pairs": 48}


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[Encoded]]:
    outline, config = load_outline("smollm2", "cpu", "auto"), PKEConfig()
    encoder = PromptEncoder(outline.tokenizer, config, context_length(outline))
    requests = [encoder.encode(request.prompt, config.refusal, end=True) for request in shipped.harmful()]
    pairs = [encoder.encode(prompt, "word " * 9, answer_tokens=config.locality_tokens) for prompt in shipped.benign()]
    return {"requests": requests, "pairs": pairs}


@pytest.mark.benchmark(group="packing")
@pytest.mark.parametrize("minibatch", MINIBATCHES)
@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def bench_packing(benchmark: Any, tokens: int, minibatch: str, prompts: Any, monkeypatch: Any) -> None:
    every, count = prompts[minibatch.split()[-1]], MINIBATCHES[minibatch]
    drawn = [random.Random(seed).sample(every, count) for seed in range(DRAWS)]
    benchmark.pedantic(lambda: packing(drawn[0], tokens), rounds=5, warmup_rounds=1)
    benchmark.extra_info["padding, in 1,000"] = _padding(drawn, tokens)
    monkeypatch.setattr(batches, "ANEW", 10**9)
    benchmark.extra_info["with as few batches as can be"] = _padding(drawn, tokens)


def _padding(drawn: Sequence[Sequence[Encoded]], tokens: int) -> float:
    """Of 1,000 tokens that run, how many are padding."""
    run = own = 0
    for sequences in drawn:
        widths = [[len(sequences[row].ids) for row in rows] for rows in packing(sequences, tokens)]
        run += sum(max(row) * len(row) for row in widths)
        own += sum(map(sum, widths))
    return 1000 * (1 - own / run)
