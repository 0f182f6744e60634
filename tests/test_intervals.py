"""Intervals against closed forms, published values and a plain bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pke_fast.errors import InputError
from pke_fast.intervals import Z95, mean_interval, newcombe, paired_difference, ratio_interval, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I, method 3 (the score method without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_s_bounds_are_where_the_score_test_rejects() -> None:
    for successes, n in ((3, 10), (50, 200), (199, 200)):
        for bound in wilson(successes, n):
            assert abs(successes / n - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_of_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(InputError, match="no rate has these counts"):
        wilson(successes, n)


def test_paired_difference_is_that_of_a_plain_bootstrap() -> None:
    random = np.random.default_rng(1)
    # Numbers, not verdicts: the second half of the first run's is halved.
    first = (random.random(80) < 0.9) / np.repeat([1.0, 2.0], 40)
    second = (random.random(80) < 0.3).astype(float)
    difference, interval = paired_difference(first.tolist(), second.tolist(), seed=3)
    assert interval is not None
    low, high = interval
    assert difference == pytest.approx(float((second - first).mean()), abs=1e-12)
    drawn = (second - first)[random.integers(0, 80, (20_000, 80))].mean(axis=1)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.013)
    assert paired_difference(first.tolist(), second.tolist(), seed=3)[1] == (low, high)


def test_pairing_tells_what_unpaired_rates_do_not() -> None:
    first = [1.0] * 50 + [0.0] * 50
    second = [1.0] * 45 + [0.0] * 55  # five prompts changed, all one way: surely less, although 50 % and 45 % overlap
    difference, interval = paired_difference(first, second)
    assert interval is not None
    low, high = interval
    assert difference == pytest.approx(-0.05)
    assert high < 0
    assert wilson(45, 100)[1] > wilson(50, 100)[0]
    assert low == pytest.approx(-0.10, abs=0.011)


def test_newcombe_of_many_pairs_is_the_plain_normal_interval() -> None:
    both, first, second, neither = 30_000, 1_000, 3_000, 6_000
    n, difference = 40_000, 0.05
    half = Z95 * math.sqrt(first + second - (first - second) ** 2 / n) / n
    assert newcombe(both, first, second, neither) == pytest.approx((difference - half, difference + half), abs=1e-4)
    low, high = newcombe(both, second, first, neither)
    assert newcombe(both, first, second, neither) == pytest.approx((-high, -low))


def test_newcombe_by_hand() -> None:
    z2 = Z95**2
    # All succeed both times: phi is 0, and each rate's own interval goes z2 / (n + z2) below 1.
    reach = z2 / (5 + z2)
    assert paired_difference([1] * 5, [1] * 5) == (0.0, pytest.approx((-reach, reach)))
    # One prompt, from 1 to 0: 1 goes down to 1 / (1 + z2), 0 goes up to z2 / (1 + z2); together they hold 0.
    reach = z2 / (1 + z2)
    difference, interval = paired_difference([1], [0])
    assert (difference, interval) == (-1.0, pytest.approx((-1.0, -1 + math.sqrt(2) * reach)))
    # Halves that agree, of 8: phi = (4 * 4 - 8 / 2) / 16 = 3 / 4, and both intervals reach z / (2 sqrt(n + z2)).
    reach = Z95 / (2 * math.sqrt(8 + z2)) * math.sqrt(2 - 2 * 3 / 4)
    assert newcombe(4, 0, 0, 4) == pytest.approx((-reach, reach))
    # Halves that disagree: phi = -(4 * 4) / 16 = -1, without correction, so that the two reaches add up.
    reach = Z95 / math.sqrt(8 + z2)
    assert newcombe(0, 4, 4, 0) == pytest.approx((-reach, reach))


def test_one_unit_has_no_interval() -> None:
    assert mean_interval([0.3]) is None
    assert ratio_interval([3.0], [2.0]) is None
    assert paired_difference([0.25], [0.5]) == (0.25, None)


def test_ratio_is_weighted() -> None:
    sums, weights = [10.0, 40.0, 33.0, 5.0], [10.0, 20.0, 30.0, 5.0]
    interval = ratio_interval(sums, weights)
    assert interval is not None
    low, high = interval
    assert 1.0 <= low < 88 / 65 < high <= 2.0
    assert ratio_interval([3.0, 6.0], [1.0, 2.0]) == pytest.approx((3.0, 3.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, float("nan")]),
        lambda: mean_interval([float("nan")]),
        lambda: paired_difference([], []),
        lambda: mean_interval([1.0], resamples=0),
        lambda: ratio_interval([1.0], [0.0]),
        lambda: ratio_interval([1.0, 2.0], [1.0]),
        lambda: paired_difference([1.0], [1.0, 0.0]),
    ],
)
def test_bad_values_are_refused(call) -> None:
    with pytest.raises(InputError):
        call()
