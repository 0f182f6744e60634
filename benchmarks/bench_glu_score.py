"""How fast glu_score is on the CPU, beside torch that computes the same outputs and scores. Run by `make bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast.kernels import glu_score_native as native
from pke_fast.kernels.glu_score import reference_bwd, reference_fwd

REQUESTS = 8
SIZES = {  # tokens, neurons, dtype: Llama-3-8B's MLP, and SmolLM2-135M's
    "[1024, 14336] fp32": (1024, 14336, torch.float32),
    "[1024, 14336] bf16": (1024, 14336, torch.bfloat16),
    "[512, 1536] fp32": (512, 1536, torch.float32),
}


class Problem(NamedTuple):
    dh: Tensor
    gate: Tensor
    up: Tensor
    offsets: Tensor


@pytest.fixture(params=list(SIZES))
def problem(request: pytest.FixtureRequest) -> Iterator[tuple[str, Problem]]:
    tokens, neurons, dtype = SIZES[request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    dh, gate, up = (torch.randn(tokens, neurons, generator=generator).to(dtype) for _ in range(3))
    yield request.param, Problem(dh, gate, up, torch.arange(0, tokens + 1, tokens // REQUESTS))
    torch.set_num_threads(threads)


def native_fwd(of: Problem) -> tuple[Tensor, ...]:
    return native.fwd(of.gate, of.up, "silu", of.offsets)


def native_bwd(of: Problem) -> tuple[Tensor, ...]:
    return native.bwd(of.dh, of.gate, of.up, "silu", of.offsets)


# torch as fast as plain code is: requests of equal length, so that one reshape reduces them; in place where it can be.


def eager_fwd(of: Problem) -> tuple[Tensor, ...]:
    h = F.silu(of.gate).mul_(of.up)
    size = h.view(REQUESTS, -1, h.shape[1]).abs()
    return h, size.mean(1, dtype=torch.float32), size.amax(1).float()


def eager_bwd(of: Problem) -> tuple[Tensor, ...]:
    active = F.silu(of.gate)
    dup = of.dh * active
    dactive = of.dh * of.up
    path = active.mul_(dactive).abs_().view(REQUESTS, -1, active.shape[1]).sum(1, dtype=torch.float32)
    dgate = torch.ops.aten.silu_backward(dactive, of.gate)
    return dgate, dup, path


def unscored_fwd(of: Problem) -> tuple[Tensor, ...]:
    """The product alone, to see what the scores cost."""
    return (F.silu(of.gate).mul_(of.up),)


@pytest.mark.parametrize("provider", [native_fwd, eager_fwd, unscored_fwd])
def bench_fwd(benchmark: Callable, problem: tuple[str, Problem], provider: Callable) -> None:
    name, of = problem
    benchmark.group = f"glu_score_fwd, {name}, {REQUESTS} requests, 2 threads"
    _check(provider(of), reference_fwd(of.gate, of.up, "silu", of.offsets))
    benchmark(provider, of)


@pytest.mark.parametrize("provider", [native_bwd, eager_bwd])
def bench_bwd(benchmark: Callable, problem: tuple[str, Problem], provider: Callable) -> None:
    name, of = problem
    benchmark.group = f"glu_score_bwd, {name}, {REQUESTS} requests, 2 threads"
    _check(provider(of), reference_bwd(of.dh, of.gate, of.up, "silu", of.offsets))
    benchmark(provider, of)


def _check(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """No figure for a wrong result."""
    for result, wanted in zip(results, truth, strict=False):
        off = (result.double() - wanted.double()).norm() / wanted.double().norm()
        assert float(off) < (1e-5 if result.dtype == wanted.dtype == truth[0].dtype == torch.float32 else 1e-2)
