"""What all sequences of an edit begin with, taken off them: it has a tape of its own, which theirs go on from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pke_fast.batches import make_batch
from pke_fast.encoding import Encoded
from pke_fast.prefix import LEAST, common
from pke_fast.structure import Structure
from pke_fast.tape import Tape, record

LOG = logging.getLogger(__name__)
ROUNDING = {torch.float32: 1e-4}  # relative differences of hidden states that it explains
ROUNDING_IN_HALF = 3e-2


def shared(sequences: Sequence[Encoded]) -> tuple[int, ...]:
    """The tokens that all begin with, before any that is supervised; () where they are too few to be worth it."""
    ids = common([sequence.ids for sequence in sequences])
    ids = ids[: min((sequence.supervised[0] for sequence in sequences), default=0)]
    return ids if len(ids) >= LEAST else ()


def beginning_of(structure: Structure, sequences: Sequence[Encoded], first: int, pad_id: int) -> Tape | None:
    """The tape of what all sequences begin with, up to the layer `first`; None where that saves nothing (layers whose
    weights come and go would be brought twice), or where the model doesn't go on from it as if it had run whole, which
    two of the sequences show."""
    ids = shared(sequences)
    if not ids or first == 0 or structure.lowest_kept > first:
        return None
    two = sorted(sequences, key=lambda sequence: len(sequence.ids))[:2]
    rest = [sequence.after(len(ids)) for sequence in two]
    try:
        beginning = record(structure, make_batch([Encoded(ids, len(ids))], [0], pad_id), first, begins=True)
        found = _head_input(record(structure, make_batch(rest, [0, 1], pad_id), first, after=beginning))
    except Exception as error:  # noqa: BLE001  whatever a model of another making says to a cache
        LOG.info("every sequence runs whole: %s", error)
        return None
    truth = _head_input(record(structure, make_batch(two, [0, 1], pad_id), first))
    apart = float((found - truth).norm() / truth.norm())
    if not apart <= ROUNDING.get(structure.dtype, ROUNDING_IN_HALF):
        LOG.info("every sequence runs whole: after its beginning, it would differ by %.2g", apart)
        return None
    return beginning


@torch.no_grad()
def _head_input(tape: Tape) -> torch.Tensor:
    """At the supervised positions."""
    return tape.supervised(tape.run()).float()
