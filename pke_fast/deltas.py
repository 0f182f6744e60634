"""What a patch adds to each weight, in fp32, and whether adding it gives the new weights to the bit.

`W + delta`, computed in fp32 and rounded to the weight's dtype, is what every tool does that adds deltas or merges
adapters. The rounded difference of new and old doesn't always lead back to new: from 1 to 1e-9 no fp32 delta leads at
all. What is missed then is at most half a step of the delta, and a second delta, added to the first's result, leads
there exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pke_fast.errors import PatchError
from pke_fast.layer_patch import LayerPatch

# Two always do: the second starts within a factor two of the new value, or from 0, where the difference is exact.
ROUNDS = 2


@dataclass(frozen=True, eq=False)
class LayerDelta:
    """What is added to the neurons' weights in one projection that change. The tensors are on the CPU.

    Attributes:
        part: of the patch.
        neurons: int64 ``[n]``, ascending; those whose weights change. May be empty.
        delta: fp32 ``[n, d]``.
        missed: of how many weights the sum isn't the new weight. Zeros of either sign are equal.
        error: the largest of these differences, 0.0 where there is none.
    """

    part: LayerPatch
    neurons: Tensor
    delta: Tensor
    missed: int
    error: float

    @property
    def index(self) -> Tensor:
        """Where the neurons are along the weight's axis, int64 ``[n]``."""
        return self.neurons + self.part.offset


def rounds_of(part: LayerPatch, rounds: int = 1) -> list[LayerDelta]:
    """The deltas of a part, each to be added to what the one before gave; no more than are needed, at least one.

    Raises:
        PatchError: a weight is infinite or NaN, or a change is too large for fp32.
    """
    found: list[LayerDelta] = []
    now = part.old
    for _ in range(rounds):
        delta = _delta(part, now)
        now = (now.float() + delta).to(part.old.dtype)
        differs = now != part.new
        missed = int(differs.sum())
        error = float((now.double() - part.new.double()).abs().max()) if missed else 0.0
        changed = (delta != 0).any(dim=1)
        found.append(LayerDelta(part, part.neurons[changed], delta[changed], missed, error))
        if not missed:
            break
    return found


def _delta(part: LayerPatch, now: Tensor) -> Tensor:
    """fp32 ``[n, d]``: new - now, rounded once. Where that misses, so did its neighbours in 3 million random cases."""
    delta = part.new.float() - now.float()
    if not bool(torch.isfinite(delta).all()):
        raise PatchError(
            f"{part.weight} changes by more than fp32 holds, or to or from infinity or NaN (layer {part.layer})",
            expected="finite weights before and after",
            do="make the patch again from a finite model",
        )
    return delta
