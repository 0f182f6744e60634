"""select_hotspots: the C++ form chooses exactly what the plain torch form does, whatever the scores."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from hotspot_problems import DENORMAL, INF, NAN, assert_equal, problems, random_scores
from hypothesis import example, given, settings
from torch import Tensor

from pke_fast import native as loader
from pke_fast.errors import InputError, PKEError
from pke_fast.kernels.select_hotspots import reference
from pke_fast.kernels.select_hotspots_native import select_hotspots as native


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On so small sorts, threads that wait for each other on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(scores: Tensor, k: int, first: int, end: int, *rest: object) -> None:
    assert_equal(native(scores, k, first, end, *rest), reference(scores, k, first, end, *rest))


@pytest.mark.parametrize("choose", [reference, native])
def test_by_hand(choose) -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0], [NAN, 9.0, 5.0], [5.0, -INF, 0.0]])
    chosen = choose(scores, 3, 0, 3)
    assert chosen.layer_ptr.tolist() == [0, 1, 3, 3]  # 9, then the first two of the three fives
    assert chosen.neurons.tolist() == [0, 1, 2]
    assert int(chosen.nan_count) == 1
    capped = choose(scores, 3, 0, 3, 1)
    assert (capped.layer_ptr.tolist(), capped.neurons.tolist()) == ([0, 1, 2, 3], [0, 1, 0])
    windowed = choose(scores, 2, 2, 3)
    assert (windowed.layer_ptr.tolist(), windowed.neurons.tolist()) == ([0, 0, 0, 2], [0, 2])
    assert int(windowed.nan_count) == 0
    exclude = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    masked = choose(scores, 2, 0, 3, 0, exclude)
    assert (masked.layer_ptr.tolist(), masked.neurons.tolist()) == ([0, 0, 1, 2], [2, 0])
    few = choose(scores, 9, 0, 3, 0, None, 4.5)
    assert (few.layer_ptr.tolist(), few.neurons.tolist()) == ([0, 1, 3, 4], [0, 1, 2, 0])


@pytest.mark.parametrize("choose", [reference, native])
def test_order_of_special_values(choose) -> None:
    negative_nans = torch.tensor([-1, 0x7F800001 - 0x80000000], dtype=torch.int32).view(torch.float32)  # last and first
    row = torch.cat([torch.tensor([NAN, -INF, -1.0, -DENORMAL, -0.0, 0.0, DENORMAL, 1.0, INF]), negative_nans])[None]
    best_first = [8, 7, 6, 4, 5, 3, 2, 1, 0, 9, 10]  # -0 and 0 are a tie, the NaN too: the lowest first
    for k in range(len(best_first) + 1):
        chosen = choose(row, k, 0, 1)
        assert chosen.neurons.tolist() == sorted(best_first[:k])
        assert int(chosen.nan_count) == 3


@pytest.mark.parametrize("choose", [reference, native])
def test_rows_by_hand(choose) -> None:
    scores = torch.tensor([[[1.0, 3.0], [2.0, NAN]], [[0.0, 0.0], [7.0, 0.0]]])
    chosen = choose(scores, 2, 0, 2)
    assert chosen.layer_ptr.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert chosen.neurons.tolist() == [1, 0, 0, 0]
    assert chosen.nan_count.tolist() == [1, 0]
    few = choose(scores, 2, 0, 2, 0, None, 2.5)  # the second row begins where the first one ends
    assert (few.layer_ptr.tolist(), few.neurons.tolist()) == ([[0, 1, 1], [1, 1, 2]], [1, 0])
    none = choose(torch.empty(0, 2, 2), 2, 0, 2)
    assert [part.shape for part in none] == [(0, 3), (0,), (0,)]


def rank(score: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(score) else (False, -score)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_reference_is_a_sort(problem) -> None:
    """The reference against Python's own stable sort, row by row."""
    scores, k, first, end, cap, exclude, minimum = problem
    chosen = reference(*problem)
    depth, width = scores.shape[-2:]
    rows = scores.reshape(-1, depth, width).tolist()
    excluded = [[[False] * width] * depth] * len(rows)
    if exclude is not None:
        excluded = exclude.reshape(-1, depth, width).tolist()
    for row, flags, pointers in zip(rows, excluded, chosen.layer_ptr.reshape(len(rows), -1).tolist(), strict=True):
        free = [
            (layer, neuron)
            for layer in range(first, end)
            for neuron in range(width)
            if not flags[layer][neuron] and (minimum < -1e38 or row[layer][neuron] >= torch.tensor(minimum))
        ]
        free.sort(key=lambda place: rank(row[place[0]][place[1]]))
        within = []
        for place in free:
            if not cap or sum(layer == place[0] for layer, _ in within) < cap:
                within.append(place)
        neurons = [
            (layer, n) for layer in range(depth) for n in chosen.neurons[pointers[layer] : pointers[layer + 1]].tolist()
        ]
        assert neurons == sorted(within[:k])


@settings(max_examples=400, deadline=None)
@given(problems())
@example((torch.zeros(3, 0), 0, 0, 3, 0, None, -INF))
@example((torch.zeros(0, 4), 0, 0, 0, 1, None, -INF))
@example((torch.zeros(2, 3, 0), 0, 0, 3, 0, None, -INF))
def test_same_as_reference(problem) -> None:
    assert_same(*problem)


BIG = (3, 20_000)  # enough for sampling, many blocks and several cuts of the candidates


@pytest.mark.parametrize("k", [0, 1, 999, 30_000, 59_999, 60_000])
@pytest.mark.parametrize(
    "shape", ["random", "ascending", "descending", "equal", "two values", "nan", "infinite", "late", "every 61st"]
)
def test_large_of_every_shape(shape: str, k: int) -> None:
    n = BIG[0] * BIG[1]
    scores = {
        "random": lambda: random_scores(*BIG),
        "ascending": lambda: torch.arange(float(n)),
        "descending": lambda: -torch.arange(float(n)),
        "equal": lambda: torch.full((n,), -2.5),
        "two values": lambda: (random_scores(1, n) > 0).float(),
        "nan": lambda: torch.full((n,), NAN),
        "infinite": lambda: torch.full((n,), INF),
        "late": lambda: torch.cat([torch.zeros(n - 1000), torch.arange(1000.0)]),
        "every 61st": lambda: (torch.arange(n) % 61 == 0).float(),  # what the sampling sees is not what there is
    }[shape]().reshape(BIG)
    assert_same(scores, k, 0, 3)
    assert_same(scores, k, 1, 3, 700, random_scores(*BIG, seed=1) > 1)


def test_guess_that_is_too_high_is_made_good() -> None:
    scores = torch.zeros(1, 61 * 1000)
    scores[0, ::61] = torch.arange(1000.0) + 1  # only where the sampling looks
    assert_same(scores, 5000, 0, 1)
    assert_same(scores, 1100, 0, 1, 0, None, 1.0)  # and then there are only 1000 that reach the minimum


def test_same_bytes_every_time() -> None:
    scores = random_scores(*BIG).round(decimals=2)  # many ties
    chosen = [native(scores, 5000, 0, 3, 2000) for _ in range(3)]
    assert all(torch.equal(c.neurons, chosen[0].neurons) for c in chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    scores = random_scores(300, 6).to(dtype).T  # neither fp32 nor contiguous
    exclude = (random_scores(300, 6, seed=1) > 0).T
    assert_same(scores, 500, 1, 6, 150, exclude, 0.1)
    assert_same(scores.float().requires_grad_(), 500, 1, 6, 150, exclude, 0.1)


def test_denormals_where_they_are_flushed_to_zero() -> None:
    scores = torch.full((1, 200), DENORMAL)
    scores[0, 150] = 4 * DENORMAL
    torch.set_flush_denormal(True)
    try:
        chosen = native(scores, 1, 0, 1)
    finally:
        torch.set_flush_denormal(False)
    assert chosen.neurons.tolist() == [150]


@pytest.mark.parametrize("choose", [reference, native])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), 1, 0, 1), r"scores\n  expected: \[layers, neurons\] or \[rows"),
        ((torch.zeros(2, 3, dtype=torch.float64), 1, 0, 1), "fp32, bf16 or fp16"),
        ((torch.zeros(2, 3), -1, 0, 2), "0 to 6, the number of neurons"),
        ((torch.zeros(2, 3), 7, 0, 2), "0 to 6, the number of neurons"),
        ((torch.zeros(2, 3), 1, 0, 3), r"layers within 0 to 2\n  got: \[0, 3\)"),
        ((torch.zeros(2, 3), 1, 2, 1), r"got: \[2, 1\)"),
        ((torch.zeros(2, 3), 1, 0, 2, -1), "per_layer_cap"),
        ((torch.zeros(2, 3), 1, 0, 2, 0, torch.zeros(3, 2, dtype=torch.uint8)), r"the scores' shape \[2, 3\]"),
        ((torch.zeros(2, 3), 1, 0, 2, 0, torch.zeros(2, 3)), "bool or uint8"),
        ((torch.zeros(2, 3), 1, 0, 2, 0, None, NAN), "minimum"),
    ],
)
def test_bad_arguments(choose, arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(*arguments)


def test_native_refuses_another_device() -> None:
    with pytest.raises(InputError, match=r"expected: a tensor on a CPU or a CUDA device\n  got: meta"):
        native(torch.zeros(2, 3, device="meta"), 1, 0, 2)


def test_missing_library_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pke_fast._native", None)  # an import of it now fails
    loader.library.cache_clear()
    try:
        with pytest.raises(PKEError, match=r"can't be loaded[\s\S]*pip install"):
            native(torch.zeros(2, 3), 1, 0, 2)
        assert "can't be loaded" in str(loader.problem())
    finally:
        loader.library.cache_clear()
