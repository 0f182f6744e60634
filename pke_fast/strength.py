"""How far an edit goes: the change is multiplied, until harmful requests that it hasn't seen are refused too.

The KL holds an edit back on all that is near a benign prompt, and by how much differs by seed and by model. What tells
is a request that wasn't edited on: whether the refusal's first token is likely there, one forward a strength.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pke_fast.batches import Batch
from pke_fast.columns import Columns
from pke_fast.encoding import Encoded
from pke_fast.objective import position_losses
from pke_fast.structure import Structure
from pke_fast.tape import record

STRENGTHS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
LIKELY = math.log(2)  # a loss below it: the token is likelier than all others together


@dataclass(frozen=True)
class Tried:
    """A strength, and how many prompts' answers begin as refusals with it.

    Attributes:
        strength: what the change was multiplied by.
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
def answers_begun(structure: Structure, columns: Sequence[Columns], batch: Batch) -> Tensor:
    """In how many rows the answer's first token is likely, at each of STRENGTHS: fp32 [S] on the head's device.

    The columns are left at the last of them.

    Args:
        batch: `beginnings`.
    """
    tape = record(structure, batch, min(column.layer for column in columns))
    targets = tape.batch.targets.to(structure.head_device)
    counts = []
    for strength in STRENGTHS:
        for column in columns:
            column.stretch(strength)
        hidden = tape.supervised(tape.run()).to(structure.head_device)
        weights = torch.ones(len(hidden), device=hidden.device)
        losses, _ = position_losses(hidden, weights, structure, targets=targets)
        counts.append((losses < LIKELY).sum())
    return torch.stack(counts).float()


def least(shares: Sequence[float], wanted: float) -> float:
    """The least of STRENGTHS at which the share is as wanted; the greatest where none is."""
    enough = (strength for strength, share in zip(STRENGTHS, shares, strict=True) if share >= wanted)
    return next(enough, STRENGTHS[-1])
