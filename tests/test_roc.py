"""ROC curves by hand, and where a point stands beside one."""

from __future__ import annotations

import random

import pytest
import torch

from pke_fast.errors import InputError
from pke_fast.intervals import wilson
from pke_fast.roc import roc, standing


def test_a_curve_by_hand() -> None:
    # Thresholds 0.9, 0.8 (one of each), 0.5, 0.3, 0.1: harmful 3, harmless 3.
    curve = roc([0.9, 0.8, 0.3], [0.8, 0.5, 0.1])
    third = 1 / 3
    assert curve.fpr.tolist() == pytest.approx([0, 0, third, 2 * third, 2 * third, 1])
    assert curve.tpr.tolist() == pytest.approx([0, third, 2 * third, 2 * third, 1, 1])
    # Pairs: 0.9 beats 3; 0.8 beats 2 and ties 1; 0.3 beats 1: 6.5 of 9.
    assert curve.auc == pytest.approx(6.5 / 9)
    assert curve.tpr_at(0) == pytest.approx(third)
    assert curve.tpr_at(third / 2) == pytest.approx(third / 2 + third)  # half of the way up the tie's line
    assert curve.tpr_at(curve.fpr[3].item()) == 1  # the highest point there
    assert curve.tpr_at(1) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_area_counts_pairs(seed: int) -> None:
    rng = random.Random(seed)
    harmful, harmless = ([rng.randrange(12) / 4 for _ in range(rng.randrange(1, 30))] for _ in range(2))
    pairs = [(a > b) + (a == b) / 2 for a in harmful for b in harmless]
    curve = roc(harmful, harmless)
    assert curve.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    for x, y in zip(curve.fpr.tolist(), curve.tpr.tolist(), strict=True):
        assert curve.tpr_at(x) >= y - 1e-12
    assert roc(torch.tensor(harmful), torch.tensor(harmless)).auc == curve.auc


def test_ends_of_a_curve() -> None:
    perfect, useless = roc([2.0, 1.0], [0.0]), roc([1.0], [1.0])
    assert (perfect.auc, perfect.tpr_at(0)) == (1, 1)
    assert (useless.auc, useless.tpr_at(0), useless.tpr_at(0.25)) == (0.5, 0, 0.25)


@pytest.mark.parametrize(
    ("harmful", "harmless"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0]), ([1.0], [float("inf")])]
)
def test_no_curve_of_these(harmful: list[float], harmless: list[float]) -> None:
    with pytest.raises(InputError, match="no ROC"):
        roc(harmful, harmless)


def test_no_point_outside() -> None:
    with pytest.raises(InputError, match="within 0 and 1"):
        roc([1.0], [0.0]).tpr_at(1.01)


def test_where_a_point_stands() -> None:
    curve = roc([4.0, 3.0, 1.0, 0.0], [2.0, -1.0])  # 50 % at no false alarm, 100 % at half of them
    above, below = standing(curve, (30, 40), (0, 10)), standing(curve, (30, 40), (5, 10))
    low, high = wilson(30, 40)
    assert above.above == pytest.approx(0.25)
    assert above.interval == pytest.approx((low - 0.5, high - 0.5))
    assert below.above == pytest.approx(-0.25)
    assert below.interval == pytest.approx((low - 1, high - 1))
