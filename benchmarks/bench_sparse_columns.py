"""How fast the C++ forms for selected columns are, beside torch's gather, Adam and scatter and its product.

Run by `make bench`. `sparse_column_update` keeps an fp32 master, so it gathers nothing: the providers that keep one too
are what to compare it with as an algorithm, those that gather are what an optimiser step on a weight's columns costs
without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pke_fast.kernels import sparse_columns, sparse_columns_native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HIDDEN, NEURONS, CHOSEN = 4096, 14336, 1000  # Llama-3-8B's down projection; the default k, all in one layer
LR, BETA1, BETA2, EPS = 0.01, 0.9, 0.999, 1e-8
TRACED = {  # tokens, d, n: a small model's layer, and Llama-3-8B's with few and with all of the hot spots
    "T=512 d=576 n=30": (512, 576, 30),
    "T=1024 d=4096 n=30": (1024, 4096, 30),
    "T=1024 d=4096 n=100": (1024, 4096, 100),
    "T=1024 d=4096 n=1000": (1024, 4096, 1000),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Problem:
    """One weight and its neurons; state as [n, d], and for torch's faster layout as [d, n]."""

    dtype: torch.dtype
    across: bool = False  # state is [d, n]
    weight: Tensor = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.weight = normal(HIDDEN, NEURONS).to(self.dtype)
        order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))
        self.neurons = order[:CHOSEN].sort().values
        old, grad = self.weight.index_select(1, self.neurons).float(), normal(HIDDEN, CHOSEN, seed=2)
        self.old, self.grad = (old, grad) if self.across else (old.T.contiguous(), grad.T.contiguous())
        self.master = torch.nn.Parameter(self.old.clone(), requires_grad=False)
        self.moment1, self.moment2 = torch.zeros_like(self.old), torch.zeros_like(self.old)
        self.master.grad = self.grad
        self.adam = torch.optim.Adam([self.master], lr=LR, fused=True)

    def update(self, update: Callable[..., None]) -> None:
        self.step += 1
        state = (self.old, self.master, self.moment1, self.moment2)
        rest = (self.step, LR, BETA1, BETA2, EPS, 0.0, math.inf)
        update(self.weight, 1, self.neurons, *state, self.grad, *rest)

    def gather(self) -> None:
        if self.dtype == torch.float32:
            torch.index_select(self.weight, 1, self.neurons, out=self.master.data)
        else:
            self.master.copy_(self.weight.index_select(1, self.neurons))

    def scatter(self) -> None:
        self.weight.index_copy_(1, self.neurons, self.master.to(self.dtype))

    def eager_adam(self) -> None:
        self.step += 1
        self.moment1.lerp_(self.grad, 1 - BETA1)
        self.moment2.mul_(BETA2).addcmul_(self.grad, self.grad, value=1 - BETA2)
        denominator = (self.moment2 / (1 - BETA2**self.step)).sqrt_().add_(EPS)
        self.master.addcdiv_(self.moment1, denominator, value=-LR / (1 - BETA1**self.step))


def native(problem: Problem) -> None:
    problem.update(sparse_columns_native.update)


def reference(problem: Problem) -> None:
    problem.update(sparse_columns.reference_update)


def gather_fused_scatter(problem: Problem) -> None:
    problem.gather()
    problem.adam.step()
    problem.scatter()


def gather_eager_scatter(problem: Problem) -> None:
    problem.gather()
    problem.eager_adam()
    problem.scatter()


def fused_scatter_with_master(problem: Problem) -> None:
    problem.adam.step()
    problem.scatter()


# [d, n] is torch's faster layout: index_copy_ then writes rows. The reference has ours, [n, d].
ACROSS = (gather_fused_scatter, gather_eager_scatter, fused_scatter_with_master)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", [native, reference, *ACROSS])
def bench_update(benchmark: Callable, threads: int, dtype: str, provider: Callable[[Problem], None]) -> None:
    benchmark.group = f"sparse_column_update, {CHOSEN} of {NEURONS} columns, d = {HIDDEN}, {dtype}, {threads} threads"
    problem, wanted = (Problem(DTYPES[dtype], provider in ACROSS), Problem(DTYPES[dtype], True))
    provider(problem)
    fused_scatter_with_master(wanted)
    # No figure for a wrong result: at most a last bit beside torch's, and nowhere but in the columns.
    change = (problem.weight.float() - wanted.weight.float()).abs_()
    assert float(change.max()) <= (1e-5 if dtype == "fp32" else 2.0**-6)
    change.index_fill_(1, wanted.neurons, 0.0)
    assert not change.any()
    benchmark(provider, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TRACED)
@pytest.mark.parametrize("provider", [sparse_columns_native.grad, sparse_columns.reference_grad])
def bench_grad(benchmark: Callable, threads: int, dtype: str, shape: str, provider: Callable[..., None]) -> None:
    benchmark.group = f"sparse_column_grad, {shape}, {dtype}, {threads} threads"
    tokens, hidden, n = TRACED[shape]
    grad_out, h = normal(tokens, hidden).to(DTYPES[dtype]), normal(tokens, n, seed=1).to(DTYPES[dtype])
    into = torch.zeros(n, hidden)
    provider(grad_out, h, into)
    torch.testing.assert_close(into, (h.double().T @ grad_out.double()).float(), rtol=1e-4, atol=1e-3)
    benchmark(provider, grad_out, h, into)
