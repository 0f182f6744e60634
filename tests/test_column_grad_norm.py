"""column_grad_norm: every form against fp64, by the relative rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pke_fast.kernels import column_grad_norm
from pke_fast.proving import assert_as_accurate, poisoned_memory

pytestmark = pytest.mark.op("column_grad_norm")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(grad: Tensor, h: Tensor, offsets: list[int]) -> Tensor:
    norms = [(grad[a:b].T @ h[a:b]).norm(dim=0) for a, b in pairwise(offsets)]
    return torch.stack(norms) if norms else h.new_zeros(0, h.shape[1])


def run(form, grad: Tensor, h: Tensor, offsets: list[int]) -> Tensor:
    inputs = (grad.to(form.device), h.to(form.device), torch.tensor(offsets, device=form.device))
    before = [x.clone() for x in inputs]
    with poisoned_memory():
        norms = torch.ops.pke_fast.column_grad_norm(*inputs)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))
    assert norms.dtype == torch.float32
    return norms.cpu()


def check(form, tokens: int, hidden: int, neurons: int, offsets: list[int], dtype: torch.dtype) -> None:
    grad, h = normal(tokens, hidden, dtype=dtype), normal(tokens, neurons, seed=1, dtype=dtype)
    truth = plain(grad.double(), h.double(), offsets)
    assert_as_accurate(run(form, grad, h, offsets), plain(grad, h, offsets), truth)


@pytest.mark.parametrize("tokens", [2, 63])  # T = 2 takes the Gram form at these sizes, 63 the direct one
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_both_forms(form, tokens, dtype, monkeypatch) -> None:
    monkeypatch.setattr(column_grad_norm, "BLOCK", 5)  # several blocks, the last one short
    assert column_grad_norm.gram_is_cheaper(tokens, 6, 17) == (tokens == 2)
    check(form, 2 * tokens + 1, 6, 17, [0, tokens, tokens, 2 * tokens], dtype)


@pytest.mark.parametrize(
    ("tokens", "hidden", "neurons", "offsets"),
    [
        (1, 1, 1, [0, 1]),
        (63, 64, 1536, [0, 1, 63]),
        (257, 40, 20, [5, 5, 130, 131, 257]),
        (257, 1000, 300, [0, 257]),
        (3, 33, 14336, [0, 2, 3]),
        (20, 8, 8, [20]),
        (4, 8, 9, [4, 4, 4]),
        (150, 20, 70, [0, 5, 150]),  # one request by the Gram matrix, one directly
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_that_break_things(form, tokens, hidden, neurons, offsets, dtype) -> None:
    check(form, tokens, hidden, neurons, offsets, dtype)


def test_strides_make_no_difference(form) -> None:
    grad, h = normal(40, 24), normal(40, 50, seed=1)
    usual = run(form, grad, h, [0, 10, 40])
    strided = run(form, grad.T.contiguous().T, torch.cat([h, h], 1)[:, 50:], [0, 10, 40])
    torch.testing.assert_close(strided, usual)


def test_same_bits_every_time(form) -> None:
    inputs = (normal(130, 64, dtype=torch.bfloat16), normal(130, 257, seed=1, dtype=torch.bfloat16), [0, 50, 130])
    first = run(form, *inputs)
    assert all(torch.equal(run(form, *inputs), first) for _ in range(2))
