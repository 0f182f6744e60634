"""Shared by all tests: one thread, no hub, small seeded examples."""

from __future__ import annotations

import os
import random

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other


@pytest.fixture
def sequences():
    """Makes n random encoded sequences of 5 to 20 tokens with answers of 1 to 4."""
    from pke_fast.encoding import Encoded

    def make(n: int, seed: int = 0) -> list[Encoded]:
        rng = random.Random(seed)
        lengths = [(rng.randint(5, 20), rng.randint(1, 4)) for _ in range(n)]
        return [Encoded(tuple(rng.randrange(256) for _ in range(a)), a - b) for a, b in lengths]

    return make
