"""The layers below the edited ones, for sequences that begin alike: what they share runs once, the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import Batch, make_batch
from pke_fast.encoding import Encoded
from pke_fast.prefix import Prefix, common
from pke_fast.structure import Structure, hooks, split_hidden
from pke_fast.tape import passed_over, record

LOG = logging.getLogger(__name__)
ROUNDING = {torch.float32: 1e-4}  # relative differences of hidden states that it explains
ROUNDING_IN_HALF = 3e-2


class Beginning:
    """What enters a layer at the first tokens of all sequences, and what the layers below attend to of them.

    Args:
        ids: the tokens.
        first: the layer.
    """

    def __init__(self, structure: Structure, ids: Sequence[int], first: int) -> None:
        self._structure, self._first = structure, first
        with self._entering() as entered:
            self._prefix = Prefix.of(structure.base, ids, structure.device)
        (self._hidden,) = entered

    def __len__(self) -> int:
        return len(self._prefix)

    @torch.no_grad()
    def go_on(self, batch: Batch) -> Tensor:
        """What enters the layer, [B, T, d], for rows that begin so."""
        ids = batch.input_ids[:, len(self) :]
        with self._entering() as entered:
            self._structure.base(
                input_ids=ids,
                attention_mask=batch.attention_mask,
                past_key_values=self._prefix.rows(len(ids)),
                use_cache=True,
            )
        return torch.cat([self._hidden.expand(len(ids), -1, -1), *entered], 1)

    @contextmanager
    def _entering(self) -> Iterator[list[Tensor]]:
        """What enters the layer while the model runs; it and those above are passed over."""
        entered: list[Tensor] = []

        def keep(_module: Any, args: Any, kwargs: Any) -> None:
            entered.append(split_hidden(args, kwargs)[0])

        layers = self._structure.layers
        with (
            hooks(layers[self._first].register_forward_pre_hook(keep, with_kwargs=True)),
            passed_over(self._structure, range(self._first, len(layers))),
        ):
            yield entered


def beginning_of(structure: Structure, sequences: Sequence[Encoded], first: int, pad_id: int) -> Beginning | None:
    """What all sequences begin with, run up to the layer `first`; None where that saves nothing, or where the model
    doesn't go on from it as if it had run whole, which one of the sequences shows."""
    ids = common([sequence.ids for sequence in sequences])
    if not ids or first == 0:
        return None
    shortest = min(sequences, key=lambda sequence: len(sequence.ids))
    batch = make_batch([shortest], [0], pad_id).to(structure.device)
    whole = record(structure, batch, first).entered
    try:
        beginning = Beginning(structure, ids, first)
        found = beginning.go_on(batch)
    except Exception as error:  # noqa: BLE001  whatever a model of another making says to a cache
        LOG.info("every sequence runs whole: %s", error)
        return None
    truth, found = (hidden[:, len(ids) :].float() for hidden in (whole, found))
    apart = float((found - truth).norm() / truth.norm())
    if not apart <= ROUNDING.get(structure.dtype, ROUNDING_IN_HALF):
        LOG.info("every sequence runs whole: after its beginning, it would differ by %.2g", apart)
        return None
    return beginning
