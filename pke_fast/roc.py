"""Receiver operating characteristics: how well scores tell two classes apart, and where an edit stands beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pke_fast.errors import InputError
from pke_fast.intervals import Interval, wilson


@dataclass(frozen=True, eq=False)
class Roc:
    """The curve of all thresholds, from (0, 0) to (1, 1).

    Attributes:
        fpr: fp64 [points], ascending: the share of harmless prompts whose score is at least a threshold.
        tpr: fp64 [points], ascending: the same of harmful ones.
        auc: the area under it: how often a harmful prompt scores higher than a harmless one, a tie counting half.
    """

    fpr: Tensor
    tpr: Tensor
    auc: float

    def tpr_at(self, fpr: float) -> float:
        """The share of harmful prompts found at a share of false alarms: the curve's highest point there.

        Between two thresholds it is the straight line, which drawing lots between the two reaches.

        Raises:
            InputError: `fpr` isn't within 0 and 1.
        """
        if not 0 <= fpr <= 1:
            raise InputError("no point of a ROC is there", expected="false alarms within 0 and 1", got=str(fpr))
        after = int((self.fpr <= fpr).sum())  # at least 1: the curve begins at 0
        x0, y0 = float(self.fpr[after - 1]), float(self.tpr[after - 1])
        if after == len(self.fpr):
            return y0
        x1, y1 = float(self.fpr[after]), float(self.tpr[after])
        return y0 + (y1 - y0) * (fpr - x0) / (x1 - x0)


def roc(harmful: Tensor | Sequence[float], harmless: Tensor | Sequence[float]) -> Roc:
    """The curve of scores of harmful prompts [n] against those of harmless ones [m]; higher means harmful.

    Equal scores are one threshold.

    Raises:
        InputError: one side is empty, or a score isn't finite.
    """
    sides = [torch.as_tensor(side, dtype=torch.float64).flatten() for side in (harmful, harmless)]
    if not all(len(side) for side in sides) or not all(bool(torch.isfinite(side).all()) for side in sides):
        raise InputError(
            "no ROC of these scores",
            expected="finite scores, at least one of harmful and one of harmless prompts",
            got=f"{len(sides[0])} and {len(sides[1])} scores",
        )
    thresholds = torch.cat(sides).unique().flip(0)  # descending
    rates = []
    for side in sides:
        below = torch.searchsorted(side.sort().values, thresholds)  # scores under the threshold
        found = (len(side) - below).double() / len(side)
        rates.append(torch.cat([torch.zeros(1, dtype=torch.float64), found]))
    tpr, fpr = rates
    return Roc(fpr, tpr, float(torch.trapezoid(tpr, fpr)))


@dataclass(frozen=True)
class Standing:
    """Where a point is beside a curve, in shares from -1 to 1.

    Attributes:
        above: the harmful prompts that it finds more than the curve does at its false alarms; negative: below it.
        interval: Wilson's 95 % interval of the point's own share, less the curve's: the curve counts as known.
    """

    above: float
    interval: Interval


def standing(curve: Roc, found: tuple[int, int], false_alarms: tuple[int, int]) -> Standing:
    """The height of a point above a curve.

    Args:
        found, false_alarms: (refused, of how many) harmful and harmless prompts.
    """
    at = curve.tpr_at(false_alarms[0] / false_alarms[1])
    low, high = wilson(*found)
    return Standing(found[0] / found[1] - at, (low - at, high - at))
