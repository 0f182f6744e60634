"""column_grad_norm: every form against fp64, by the relative rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pke_fast.choice import using
from pke_fast.errors import InputError
from pke_fast.kernels import column_grad_norm, column_grad_norm_native
from pke_fast.proving import assert_as_accurate, poisoned_memory

pytestmark = pytest.mark.op("column_grad_norm")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unchanged(x: Tensor, old: Tensor) -> bool:
    return bool(((x == old) | ((x != x) & (old != old))).all())  # NaN too


def plain(grad: Tensor, h: Tensor, offsets: list[int]) -> Tensor:
    norms = [(grad[a:b].T @ h[a:b]).norm(dim=0) for a, b in pairwise(offsets)]
    return torch.stack(norms) if norms else h.new_zeros(0, h.shape[1])


def run(form, grad: Tensor, h: Tensor, offsets: list[int], longest: int | None = None) -> Tensor:
    inputs = (grad.to(form.device), h.to(form.device), torch.tensor(offsets, device=form.device))
    before = [x.clone() for x in inputs]
    with poisoned_memory():
        norms = torch.ops.pke_fast.column_grad_norm(*inputs, longest)
    assert all(unchanged(x, old) for x, old in zip(inputs, before, strict=True))
    assert norms.dtype == torch.float32
    return norms.cpu()


def check(form, tokens: int, hidden: int, neurons: int, offsets: list[int], dtype: torch.dtype) -> None:
    grad, h = normal(tokens, hidden, dtype=dtype), normal(tokens, neurons, seed=1, dtype=dtype)
    truth = plain(grad.double(), h.double(), offsets)
    for longest in (None, max((b - a for a, b in pairwise(offsets)), default=0)):
        assert_as_accurate(run(form, grad, h, offsets, longest), plain(grad, h, offsets), truth)


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
        (257, 500, 100, [0, 257]),
        (31, 1030, 90, [0, 9, 31]),  # K's sums are split over the hidden size, unevenly
        (3, 33, 5001, [0, 2, 3]),
        (20, 8, 8, [20]),
        (4, 8, 9, [4, 4, 4]),
        (150, 20, 70, [0, 5, 150]),  # one request by the Gram matrix, one directly
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_that_break_things(form, tokens, hidden, neurons, offsets, dtype) -> None:
    check(form, tokens, hidden, neurons, offsets, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # in fp32 the Gram matrix costs accuracy here
def test_where_the_tokens_cancel(form, dtype) -> None:
    """The norms are about a hundredth of what tokens add: a Gram matrix of 8 bits would be off by several per cent."""
    signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    grad = (signs * normal(1, 100) + 0.1 * normal(16, 100, seed=1)).to(dtype)
    h = (normal(1, 60, seed=2) + 0.1 * normal(16, 60, seed=3)).to(dtype)
    truth = plain(grad.double(), h.double(), [0, 16])
    assert_as_accurate(run(form, grad, h, [0, 16]), plain(grad, h, [0, 16]), truth)


def test_nan_shows_in_its_neuron_and_request_alone(form) -> None:
    grad, h = normal(50, 24), normal(50, 20, seed=1)
    h[45, 7] = torch.nan
    assert run(form, grad, h, [0, 42, 50]).isnan().nonzero().tolist() == [[1, 7]]


def test_more_requests_than_are_searched_at_once(form, monkeypatch) -> None:
    monkeypatch.setattr(pytest.importorskip("pke_fast.kernels.triton_ragged"), "SEARCHED", 4)
    check(form, 100, 20, 30, [1, 2, 2, 5, 9, 48, 49, 90, 90, 96], torch.float32)


def test_strides_make_no_difference(form) -> None:
    grad, h = normal(40, 24), normal(40, 50, seed=1)
    usual = run(form, grad, h, [0, 10, 40])
    strided = run(form, grad.T.contiguous().T, torch.cat([h, h], 1)[:, 50:], [0, 10, 40])
    torch.testing.assert_close(strided, usual)


def test_same_bits_every_time(form) -> None:
    inputs = (normal(130, 64, dtype=torch.bfloat16), normal(130, 257, seed=1, dtype=torch.bfloat16), [0, 50, 130])
    first = run(form, *inputs)
    assert all(torch.equal(run(form, *inputs), first) for _ in range(2))


def test_in_mixed_precision(form) -> None:
    """Under autocast the output, and so its gradient, is shorter than what came in."""
    grad, h = normal(40, 24, dtype=torch.bfloat16), normal(40, 50, seed=1)
    torch.testing.assert_close(run(form, grad, h, [0, 10, 40]), run(form, grad.float(), h, [0, 10, 40]))


@pytest.mark.parametrize("tokens", [*range(1, 14), 90])  # register tiles of six tokens, and what is left over
def test_native_in_every_tile(tokens, monkeypatch) -> None:
    monkeypatch.setattr(column_grad_norm_native, "BLOCK_ELEMENTS", 500)  # several groups, several parts
    grad, h = normal(3 * tokens, 700), normal(3 * tokens, 131, seed=1)
    offsets = [0, tokens, 2 * tokens, 3 * tokens]
    truth = plain(grad.double(), h.double(), offsets)
    with using("native"):
        norms = torch.ops.pke_fast.column_grad_norm(grad, h, torch.tensor(offsets))
    assert_as_accurate(norms, plain(grad, h, offsets), truth)


def test_native_is_independent_of_the_thread_count(monkeypatch) -> None:
    """Less the products, which are torch's."""
    grad, h, offsets = normal(200, 96), normal(200, 1500, seed=1), [0, 50, 120, 200]
    grams = {b - a: grad[a:b] @ grad[a:b].T for a, b in pairwise(offsets)}
    monkeypatch.setattr(column_grad_norm_native, "_gram", lambda g: grams[len(g)])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with using("native"):
                results.append(torch.ops.pke_fast.column_grad_norm(grad, h, torch.tensor(offsets)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled for the GPU here")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": torch.zeros(3, 6)}, "grad_out"),
        ({"grad_out": torch.zeros(4)}, "grad_out"),
        ({"h": torch.zeros(4, 5, dtype=torch.float64)}, "fp32, bf16 or fp16"),
        ({"h": torch.zeros(4)}, "h"),
        ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, "offsets"),
        ({"longest": -1}, "longest"),
    ],
)
def test_bad_arguments(backend, change, message) -> None:
    arguments = {"grad_out": torch.zeros(4, 6), "h": torch.zeros(4, 5), "offsets": torch.tensor([0, 4]), **change}
    with using(backend), pytest.raises(InputError, match=message):
        torch.ops.pke_fast.column_grad_norm(*arguments.values())
    usual = {"grad_out": torch.zeros(4, 6), "h": torch.zeros(4, 5), "offsets": torch.tensor([0, 4])}
    with using(backend), pytest.raises(InputError, match=message):
        torch.ops.pke_fast.column_grad_norm(*{**usual, **change}.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled for the GPU here")
def test_triton_takes_scratch_for_the_longest_request_alone(monkeypatch) -> None:
    """K is as wide as that, and its split sums take no more than h does."""
    made: list[int] = []
    empty = torch.empty

    def counted(*shape: int, **more: object) -> Tensor:
        made.append((out := empty(*shape, **more)).nbytes)
        return out

    grad, h, offsets = normal(320, 400), normal(320, 300), torch.arange(0, 321, 16)
    with using("triton"):
        torch.ops.pke_fast.column_grad_norm(grad, h, offsets)
        monkeypatch.setattr(torch, "empty", counted)
        torch.ops.pke_fast.column_grad_norm(grad, h, offsets, 16)
    _norms, _partials, gram, *sums = made
    assert gram == 320 * 16 * 4
    assert sum(sums) <= h.nbytes


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_request_longer_than_was_said_is_refused_where_it_shows(backend) -> None:
    inputs = torch.zeros(4, 6), torch.zeros(4, 5), torch.tensor([0, 3, 4])
    with using(backend):
        torch.ops.pke_fast.column_grad_norm(*inputs, 3)
        with pytest.raises(InputError, match=r"longest[\s\S]*3 or more tokens"):
            torch.ops.pke_fast.column_grad_norm(*inputs, 2)


def test_native_refuses_offsets_that_lead_elsewhere() -> None:
    with using("native"), pytest.raises(InputError, match="offsets"):
        torch.ops.pke_fast.column_grad_norm(torch.zeros(4, 6), torch.zeros(4, 5), torch.tensor([0, 5]))
