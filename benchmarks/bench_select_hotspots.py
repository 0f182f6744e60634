"""How fast select_hotspots is, beside torch.topk and numpy.argpartition: on one thread by `make bench`, on a GPU by
`make gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pke_fast.kernels.select_hotspots import reference
from pke_fast.kernels.select_hotspots_native import select_hotspots as native

# Layers, neurons a layer and k: Llama-3-8B's 32 x 14,336 with the default k, and 400 such layers.
SIZES = {"458,752 k=1,000": (32, 14336, 1_000), "5,734,400 k=50,000": (400, 14336, 50_000)}


@pytest.fixture(params=list(SIZES))
def problem(request: pytest.FixtureRequest) -> Iterator[tuple[Tensor, int]]:
    depth, width, k = SIZES[request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Products of positive heavy-tailed factors, a different scale a layer: what scores look like.
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(depth, width, generator=generator).exp() * torch.rand(depth, 1, generator=generator)
    yield scores, k
    torch.set_num_threads(threads)


def _native(scores: Tensor, k: int) -> Tensor:
    return native(scores, k, 0, len(scores)).neurons


def _native_capped(scores: Tensor, k: int) -> Tensor:
    return native(scores, k, 0, len(scores), k // 10).neurons


def _topk_sorted(scores: Tensor, k: int) -> Tensor:
    return scores.flatten().topk(k).indices


def _topk_unsorted(scores: Tensor, k: int) -> Tensor:
    return scores.flatten().topk(k, sorted=False).indices


def _argpartition(scores: Tensor, k: int) -> np.ndarray:
    return np.argpartition(scores.flatten().numpy(), -k)[-k:]


@pytest.mark.parametrize("choose", [_native, _native_capped, _topk_sorted, _topk_unsorted, _argpartition])
def bench_select(benchmark: Callable, problem: tuple[Tensor, int], choose: Callable) -> None:
    scores, k = problem
    benchmark.group = f"select_hotspots, {scores.numel():,} scores, k = {k:,}, one thread"
    if choose in (_native, _native_capped):  # no figure for a wrong result
        cap = k // 10 if choose is _native_capped else 0
        expected = reference(scores, k, 0, len(scores), cap)
        got = native(scores, k, 0, len(scores), cap)
        assert torch.equal(got.layer_ptr, expected.layer_ptr)
        assert torch.equal(got.neurons, expected.neurons)
    benchmark(choose, scores, k)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choose", [_native, _native_capped, _topk_sorted, _topk_unsorted])
def bench_select_on_gpu(benchmark: Callable, problem: tuple[Tensor, int], choose: Callable, dtype: torch.dtype) -> None:
    """From the call to the end of the work on the device."""
    scores, k = problem[0].to("cuda", dtype), problem[1]
    benchmark.group = (
        f"select_hotspots, {scores.numel():,} scores, k = {k:,}, {dtype} on {torch.cuda.get_device_name()}"
    )
    expected = reference(scores.cpu(), k, 0, len(scores))
    got = native(scores, k, 0, len(scores))
    assert torch.equal(got.layer_ptr.cpu(), expected.layer_ptr)
    assert torch.equal(got.neurons.cpu(), expected.neurons)

    def run() -> None:
        choose(scores, k)
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=200, warmup_rounds=20)
