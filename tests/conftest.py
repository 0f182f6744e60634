"""Shared by all tests: one thread, no hub, small seeded examples."""

from __future__ import annotations

import importlib
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--extension", type=Path, metavar="FOLDER", help="test the pke_fast/_native that lies in this folder"
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--extension")
    if folder is None:
        return
    import pke_fast

    pke_fast.__path__.insert(0, str(Path(folder, "pke_fast").resolve()))
    found = Path(importlib.import_module("pke_fast._native").__file__)
    if not found.is_relative_to(Path(folder).resolve()):
        raise pytest.UsageError(f"there is no pke_fast/_native in {folder}: {found} would be tested")


@pytest.fixture
def sequences():
    """Makes n random encoded sequences of 5 to 20 tokens with answers of 1 to 4."""
    from pke_fast.encoding import Encoded

    def make(n: int, seed: int = 0) -> list[Encoded]:
        rng = random.Random(seed)
        lengths = [(rng.randint(5, 20), rng.randint(1, 4)) for _ in range(n)]
        return [Encoded(tuple(rng.randrange(256) for _ in range(a)), a - b) for a, b in lengths]

    return make
