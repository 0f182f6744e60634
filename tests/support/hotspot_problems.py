"""Problems for select_hotspots, and when two results are the same: shared by the tests of its forms."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from pke_fast.kernels.select_hotspots import Selected

INF, NAN = math.inf, math.nan
DENORMAL = 1e-45
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, DENORMAL, -DENORMAL, 1e30, -1e30, 0.5, 0.25])
WIDTHS = (1, 2, 7, 63, 64, 65, 200)


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def problems(draw: st.DrawFn, widths: tuple[int, ...] = WIDTHS) -> tuple:
    """Arguments of select_hotspots: [L, D] or [R, L, D], ties, special values, k at both ends, every constraint."""
    rows = draw(st.sampled_from([(), (), (1,), (2,), (3,)]))
    depth, width = draw(st.integers(1, 5)), draw(st.sampled_from(widths))
    size, shape = depth * width, (*rows, depth, width)
    total = math.prod(shape)
    seeds = st.integers(0, 99)
    if draw(st.booleans()):  # a few values only: ties everywhere
        pool = draw(st.lists(VALUES, min_size=1, max_size=4))
        picks = torch.randint(len(pool), (total,), generator=torch.Generator().manual_seed(draw(seeds)))
        scores = torch.tensor(pool)[picks]
    else:
        scores = random_scores(total, seed=draw(seeds))
        for place, value in draw(st.lists(st.tuples(st.integers(0, total - 1), VALUES), max_size=8)):
            scores[place] = value
    first = draw(st.integers(0, depth))
    end = draw(st.integers(first, depth))
    k = draw(st.one_of(st.sampled_from([0, 1, size]), st.integers(0, size)))
    cap = draw(st.one_of(st.just(0), st.integers(1, width + 1)))
    share = draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(draw(seeds))
    exclude = None if share is None else torch.rand(shape, generator=generator) < share
    minimum = draw(st.one_of(st.just(-INF), VALUES.filter(lambda v: not math.isnan(v)), st.just(-1e300)))
    return scores.reshape(shape), k, first, end, cap, exclude, minimum


def assert_equal(got: Selected, expected: Selected) -> None:
    assert got.layer_ptr.tolist() == expected.layer_ptr.tolist()
    assert got.neurons.tolist() == expected.neurons.tolist()
    assert got.nan_count.tolist() == expected.nan_count.tolist()
    assert [part.shape for part in got] == [part.shape for part in expected]
    assert got.layer_ptr.dtype == got.neurons.dtype == got.nan_count.dtype == torch.int64
