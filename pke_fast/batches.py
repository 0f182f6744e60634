"""Encoded sequences packed by length into micro-batches, with the positions whose next token is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pke_fast.encoding import Encoded

ANEW = 64  # tokens that a batch costs besides its own


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of B sequences, padded on the right to T tokens.

    Attributes:
        input_ids, attention_mask: int64 [B, T].
        groups: each row's group (a request), ascending; the rows of one group are neighbours in one batch.
        rows: each row's index among the sequences that were packed.
        positions: int64 [N], the supervised positions in the flattened [B * T]: those that predict an answer's tokens,
            and those held in prompts.
        targets: int64 [N], the tokens they should predict.
        owners: int64 [N], the row that each belongs to.
        nth: int64 [N], which token of its answer each predicts, from 0; -1 within a prompt.
    """

    input_ids: Tensor
    attention_mask: Tensor
    groups: tuple[int, ...]
    rows: tuple[int, ...]
    positions: Tensor
    targets: Tensor
    owners: Tensor
    nth: Tensor

    def group_offsets(self) -> list[int]:
        """Where each group's tokens begin in the flattened [B * T], and where the last one's end."""
        length = self.input_ids.shape[1]
        starts = [i for i, g in enumerate(self.groups) if i == 0 or g != self.groups[i - 1]]
        return [row * length for row in (*starts, len(self.groups))]

    def answer_weights(
        self, first_token_weight: float = 1.0, sign: Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        """Weights [N] that make a sum over positions a sum over rows of each answer's mean.

        Args:
            first_token_weight: weight of an answer's first token in its mean, where the others weigh 1.
            sign: a factor for each row, fp32 [B]; 1 where it is None.
            prompt_weight: of the mean over the positions held in a prompt, which is added to the answer's.
        """
        within = self.nth < 0
        weights = self._shares(torch.where(self.nth == 0, first_token_weight, 1.0).masked_fill(within, 0.0))
        if prompt_weight:
            weights = weights + prompt_weight * self._shares(within.float())
        return weights if sign is None else weights * sign[self.owners]

    def _shares(self, weights: Tensor) -> Tensor:
        """Each position's share of its row's sum; 0 in rows that have none."""
        totals = torch.zeros(len(self.rows), device=weights.device).index_add_(0, self.owners, weights)
        return weights / totals[self.owners].masked_fill(weights == 0, 1.0)

    def to(self, device: torch.device) -> Batch:
        tensors: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def pack(sequences: Sequence[Encoded], tokens: int, pad_id: int, groups: Sequence[int] | None = None) -> list[Batch]:
    """The micro-batches of `packing`, made."""
    return [make_batch(sequences, rows, pad_id, groups) for rows in packing(sequences, tokens, groups)]


def packing(sequences: Sequence[Encoded], tokens: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Which sequences go together: longest first, so that neighbours are of like length, and split where that costs the
    fewest tokens, padding and `ANEW` for each batch counted.

    Args:
        tokens: most tokens in a batch, padding counted; one group alone may exceed it.
        groups: sequences of one group stay in one batch; by default each is its own.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups if groups is not None else range(len(sequences))):
        members.setdefault(group, []).append(index)
    longest = {group: max(len(sequences[i].ids) for i in rows) for group, rows in members.items()}
    order = sorted(members, key=lambda g: (-longest[g], g))
    cheapest = [(0, 0)]  # of the last groups, by their number: what they cost, and how many are the first batch
    for first in reversed(range(len(order))):
        costs: list[tuple[int, int]] = []
        rows = 0
        for end in range(first + 1, len(order) + 1):
            rows += len(members[order[end - 1]])
            taken = rows * longest[order[first]]
            if taken > tokens and costs:
                break
            costs.append((ANEW + taken + cheapest[len(order) - end][0], end - first))
        cheapest.append(min(costs))
    packed: list[list[int]] = []
    first = 0
    while first < len(order):
        count = cheapest[len(order) - first][1]
        packed.append([row for group in order[first : first + count] for row in members[group]])
        first += count
    return packed


def make_batch(
    sequences: Sequence[Encoded], rows: Sequence[int], pad_id: int, groups: Sequence[int] | None = None
) -> Batch:
    """One micro-batch of the sequences `rows`, which come in the order of their groups."""
    by_group = sorted(rows, key=lambda i: (groups[i] if groups is not None else i, i))
    length = max(len(sequences[i].ids) for i in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(input_ids)
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    nth: list[int] = []
    for row, i in enumerate(by_group):
        ids, places = sequences[i].ids, sequences[i].supervised
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        positions += [row * length + place for place in places]
        targets += [ids[place + 1] for place in places]
        owners += [row] * len(places)
        nth += [max(-1, place + 1 - sequences[i].prompt_length) for place in places]
    named = tuple(groups[i] if groups is not None else i for i in by_group)
    tensors = (torch.tensor(values) for values in (positions, targets, owners, nth))
    return Batch(input_ids, mask, named, tuple(by_group), *tensors)
