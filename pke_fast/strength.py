"""How far an edit goes: what it says is multiplied, until harmful requests that it hasn't seen are refused too.

With detectors that is their columns of down alone: what they say then is louder, and all else as the steps left it.
Without, it is the whole change. The KL holds an edit back on all that is near a benign prompt, and by how much differs
by seed and by model. What tells is a request that wasn't edited on: whether the refusal's first token is likely there,
one forward a strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pke_fast.batches import Batch
from pke_fast.encoding import Encoded
from pke_fast.objective import position_losses
from pke_fast.structure import Structure
from pke_fast.tape import record

WHOLE = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)  # of the change
LOUDER = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # of what detectors say
LIKELY = math.log(2)  # a loss below it: the token is likelier than all others together


@dataclass(frozen=True)
class Tried:
    """A strength, and how many prompts' answers begin as refusals with it.

    Attributes:
        strength: what the change, or what the detectors say, was multiplied by.
        refused, unseen: of the harmful requests that weren't edited on, so many of so many.
        held_refused, held: of harmless prompts that the edit holds.
    """

    strength: float
    refused: int
    unseen: int
    held_refused: int
    held: int


def beginnings(sequences: Sequence[Encoded]) -> list[Encoded]:
    """The sequences up to their answers' first token."""
    return [Encoded(s.ids[: s.prompt_length + 1], s.prompt_length) for s in sequences]


def refusing(held: Sequence[Encoded], unseen: Sequence[Encoded]) -> list[Encoded]:
    """Some of the held prompts, evenly chosen, at most half as many as there are unseen requests (they only show what
    a strength costs), each with the token that the safe answer to the first of these begins with."""
    prompts = held[:: -(-2 * len(held) // len(unseen)) or 1]
    token = unseen[0].ids[unseen[0].prompt_length]
    return [Encoded((*s.ids[: s.prompt_length], token), s.prompt_length) for s in prompts]


@torch.no_grad()
def answers_begun(
    structure: Structure, batch: Batch, first: int, strengths: Sequence[float], stretch: Callable[[float], None]
) -> Tensor:
    """In how many rows the answer's first token is likely, at each of the strengths: fp32 [S] on the head's device.

    Args:
        batch: `beginnings`.
        first: the lowest layer that is edited.
        stretch: gives the weights a strength; they are left at the last.
    """
    tape = record(structure, batch, first)
    targets = tape.batch.targets.to(structure.head_device)
    counts = []
    for strength in strengths:
        stretch(strength)
        hidden = tape.supervised(tape.run()).to(structure.head_device)
        weights = torch.ones(len(hidden), device=hidden.device)
        losses, _ = position_losses(hidden, weights, structure, targets=targets)
        counts.append((losses < LIKELY).sum())
    return torch.stack(counts).float()


def least(strengths: Sequence[float], shares: Sequence[float], wanted: float) -> float:
    """The least of the strengths at which the share is as wanted; the greatest where none is."""
    enough = (strength for strength, share in zip(strengths, shares, strict=True) if share >= wanted)
    return next(enough, strengths[-1])
