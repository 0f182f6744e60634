"""95 % intervals: Wilson's for a rate, Newcombe's for two paired ones, the bootstrap's for a mean and a ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pke_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Interval = tuple[float, float]

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 10_000
SEED = 0
_AT_ONCE = 4_000_000  # counts drawn at a time: 32 MB


def wilson(successes: int, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a rate of `successes` out of `n` (Wilson 1927), without continuity correction.

    It holds its 95 % far better than the plain normal interval near 0 and 1, where attack success rates are.

    Args:
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        InputError: n < 1, or successes not within 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(
            "no rate has these counts", expected="0 <= successes <= n and n >= 1", got=f"{successes} of {n}"
        )
    rate, z2 = successes / n, z * z
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # At the ends the exact bound is the rate itself; rounding would put it a hair inside.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


def newcombe(both: int, first: int, second: int, neither: int) -> Interval:
    """The 95 % interval of the second rate less the first, of pairs.

    Newcombe's hybrid score method with a continuity-corrected phi (Newcombe 1998, Statistics in Medicine 17:2635,
    method 10): the two rates' own intervals by Wilson, put together by the correlation within pairs. Unlike the
    bootstrap's, it stays wide where few pairs are known, though none differs, or all do.

    Args:
        both, first, second, neither: pairs of which both succeeded, only the first, only the second, neither; one or
            more in all.
    """
    n = both + first + second + neither
    one, other = both + first, both + second
    (low1, high1), (low2, high2) = wilson(one, n), wilson(other, n)
    excess: float = both * neither - first * second
    if excess > 0:
        excess = max(excess - n / 2, 0)
    spread = math.sqrt(one * (n - one) * other * (n - other))
    phi = excess / spread if spread else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * phi * a * b + b * b)

    rate1, rate2, difference = one / n, other / n, (second - first) / n
    return difference - joined(rate2 - low2, high1 - rate1), difference + joined(high2 - rate2, rate1 - low1)


def mean_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval | None:
    """The percentile bootstrap's 95 % interval of a mean; None of a single value, which says nothing of chance.

    Args:
        values: one number a prompt, finite.
        resamples, seed: the same seed gives the same interval.

    Raises:
        InputError: there are no values, one isn't finite, or resamples < 1.
    """
    return ratio_interval(values, [1.0] * len(values), resamples=resamples, seed=seed)


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, Interval | None]:
    """The mean of ``second - first`` and its 95 % interval, paired by prompt.

    Where all numbers are 0 or 1, as verdicts are, the interval is Newcombe's; else the bootstrap's (prompts are drawn,
    not answers), and None of a single prompt.

    Args:
        first, second: one number a prompt, both in the same order of prompts.
        resamples, seed: of the bootstrap.

    Raises:
        InputError: the lengths differ; or as `mean_interval`.
    """
    if len(first) != len(second):
        raise InputError(
            "two runs can't be paired",
            expected="the same prompts in both",
            got=f"{len(first)} and {len(second)} values",
        )
    pairs = [(float(a), float(b)) for a, b in zip(first, second, strict=True)]
    differences = [b - a for a, b in pairs]
    interval: Interval | None
    if pairs and all(value in (0, 1) for pair in pairs for value in pair):
        interval = newcombe(*(pairs.count(kind) for kind in ((1, 1), (1, 0), (0, 1), (0, 0))))
    else:
        interval = mean_interval(differences, resamples=resamples, seed=seed)
    return math.fsum(differences) / len(differences), interval


def ratio_interval(
    sums: Sequence[float], weights: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The percentile bootstrap's 95 % interval of ``sum(sums) / sum(weights)``, as of a loss per token over windows.

    None of a single unit: every resample would be the same.

    Args:
        sums, weights: one pair a unit that is drawn; weights are positive.

    Raises:
        InputError: as `mean_interval`; or a weight isn't positive.
    """
    import numpy as np

    pairs = np.array([sums, weights], dtype=np.float64).T if len(sums) == len(weights) else np.empty((0, 2))
    if not len(pairs) or not np.isfinite(pairs).all() or (pairs[:, 1] <= 0).any():
        raise InputError(
            "no interval of these values",
            expected="finite numbers, at least one, each with a positive weight",
            got=f"{len(sums)} values, {len(weights)} weights",
        )
    if resamples < 1:
        raise InputError("no interval without resamples", expected="at least 1", got=str(resamples))
    if len(pairs) == 1:
        return None
    drawn = _resampled(pairs, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def listed(interval: Interval | None) -> list[float] | None:
    """An interval as JSON has it."""
    return None if interval is None else list(interval)


def _resampled(pairs: np.ndarray[Any, Any], resamples: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """[resamples] ratios. Units of equal value are drawn together: verdicts have three differences, not n."""
    import numpy as np

    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    n = int(counts.sum())
    rows = max(1, _AT_ONCE // len(kinds))
    parts = []
    for start in range(0, resamples, rows):
        times = random.multinomial(n, counts / n, size=min(rows, resamples - start))
        sums = times @ kinds
        parts.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(parts)
