"""Half precision on a CPU without instructions for it: products here and torch's, and tracing with either.

Run by `make bench`; skipped where this CPU multiplies bf16 itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pke_fast.bench.subjects import loaded_subject
from pke_fast.kernels import products
from pke_fast.pace import Pace
from pke_fast.scoring import score

pytestmark = pytest.mark.skipif(
    not products.without_instructions(torch.bfloat16), reason="this CPU has instructions for bf16"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [("torchs", "fp32"), *((provider, dtype) for dtype in ("bf16", "fp16") for provider in ("ours", "torchs"))]
TOKENS, HIDDEN, NEURONS = 128, 2048, 8192  # of an up projection of Llama-3.2-1B, and of the way back through it
REQUESTS = 4
PRODUCTS: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("torchs", "up"): torch.nn.functional.linear,
    ("torchs", "back"): torch.matmul,
    ("ours", "up"): products.linear,
    ("ours", "back"): products.matmul,
}


def rounds_of(provider: str, dtype: str, most: int) -> dict[str, int]:
    """Torch's products in half precision take seconds each."""
    few = provider == "torchs" and dtype != "fp32"
    return {"rounds": 1 if few else most, "warmup_rounds": 0 if few else 1}


@pytest.mark.parametrize(("provider", "dtype"), CASES)
@pytest.mark.parametrize("way", ["up", "back"])
def test_product(benchmark: Any, way: str, provider: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NEURONS, HIDDEN, generator=generator).to(DTYPES[dtype])
    x = torch.randn(TOKENS, HIDDEN if way == "up" else NEURONS, generator=generator).to(DTYPES[dtype])
    benchmark.group = f"{TOKENS} tokens, {HIDDEN} x {NEURONS}, {way}"
    found = benchmark.pedantic(PRODUCTS[provider, way], (x, weight), **rounds_of(provider, dtype, 9))
    assert found.dtype == x.dtype


@pytest.mark.parametrize(("provider", "dtype"), CASES)
def test_trace(benchmark: Any, provider: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider == "torchs":
        monkeypatch.setattr(products, "without_instructions", lambda _dtype: False)
    benchmark.group = f"trace and score {REQUESTS} shipped requests, SmolLM2-135M"
    with loaded_subject("smollm2", REQUESTS, dtype=dtype) as subject:
        examples = [[(sequence, 1.0)] for sequence in subject.requests]

        def trace() -> None:
            score(subject.structure, examples, pad_id=subject.pad_id, pace=Pace(512))

        benchmark.pedantic(trace, **rounds_of(provider, dtype, 3))
