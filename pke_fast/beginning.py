"""What all sequences of an edit begin with, taken off them: it has a tape of its own, which theirs go on from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pke_fast.batches import make_batch
from pke_fast.encoding import Encoded, shared
from pke_fast.placement import brought_at_every_call
from pke_fast.structure import Structure
from pke_fast.tape import Tape, record

LOG = logging.getLogger(__name__)
ROUNDING = {torch.float32: 1e-4}  # relative differences of hidden states that it explains
ROUNDING_IN_HALF = 3e-2


def beginning_of(structure: Structure, sequences: Sequence[Encoded], first: int, pad_id: int) -> Tape | None:
    """The tape of what all sequences begin with, up to the layer `first`; None where that saves nothing (weights that
    are brought at every call would come twice), or where the model doesn't go on from it as if it had run whole, which
    the shortest sequences and the longest show."""
    ids = shared(sequences)
    if not ids or first == 0 or any(brought_at_every_call(layer) for layer in list(structure.layers)[first:]):
        return None
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))
    try:
        beginning = record(structure, make_batch([Encoded(ids, len(ids))], [0], pad_id), first, begins=True)
        for some in (ordered[:2], ordered[-1:]):
            rest = make_batch([sequence.after(len(ids)) for sequence in some], range(len(some)), pad_id)
            found = _head_input(record(structure, rest, first, after=beginning))
            truth = _head_input(record(structure, make_batch(some, range(len(some)), pad_id), first))
            apart = float((found - truth).norm() / truth.norm())
            if not apart <= ROUNDING.get(structure.dtype, ROUNDING_IN_HALF):
                LOG.info("every sequence runs whole: after its beginning, it would differ by %.2g", apart)
                return None
    except Exception as error:  # noqa: BLE001  whatever a model of another making says to a cache
        LOG.info("every sequence runs whole: %s", error)
        return None
    return beginning


@torch.no_grad()
def _head_input(tape: Tape) -> torch.Tensor:
    """At the supervised positions."""
    return tape.supervised(tape.run()).float()
