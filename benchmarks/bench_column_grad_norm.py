"""How fast column_grad_norm is on the CPU, beside its reference and torch's product and norm. Run by `make bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pke_fast.kernels.column_grad_norm import reference
from pke_fast.kernels.column_grad_norm_native import column_grad_norm as native

SIZES = {  # requests, tokens each, d, D: SmolLM2-135M's MLP, and Llama-3-8B's
    "32 x 64, d=576, D=1536": (32, 64, 576, 1536),
    "8 x 128, d=4096, D=14336": (8, 128, 4096, 14336),
}
Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=list(SIZES))
def problem(request: pytest.FixtureRequest) -> Iterator[tuple[str, Problem]]:
    requests, tokens, hidden, neurons = SIZES[request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    grad, h = (torch.randn(requests * tokens, n, generator=generator) for n in (hidden, neurons))
    yield request.param, (grad, h, torch.arange(requests + 1) * tokens)
    torch.set_num_threads(threads)


def product_and_norm(grad: Tensor, h: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack([(grad[a:b].T @ h[a:b]).norm(dim=0) for a, b in pairwise(offsets.tolist())])


@pytest.mark.parametrize("provider", [native, reference, product_and_norm])
def bench_norms(benchmark: Callable, problem: tuple[str, Problem], provider: Callable) -> None:
    name, inputs = problem
    benchmark.group = f"column_grad_norm, {name}, fp32, 2 threads"
    torch.testing.assert_close(provider(*inputs), reference(*inputs), rtol=1e-4, atol=1e-3)  # no figure for a wrong one
    benchmark(provider, *inputs)
