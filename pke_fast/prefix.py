"""What all sequences begin with, such as a chat template's system prompt, runs once; the rest attends to what is kept.

Of short prompts that is often half of the work. It is for layers that don't change meanwhile: those below the edited
ones, and all of a model that answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST = 8  # tokens: fewer save less than they cost


def common(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The token ids that all begin with, less what would leave one of them empty; () for fewer than LEAST, or one
    sequence."""
    if len(sequences) < 2:
        return ()
    ordered = sorted(map(tuple, sequences))
    first, last = ordered[0], ordered[-1]  # these two differ the soonest
    most = min(len(ids) for ids in sequences) - 1
    length = next((place for place in range(most) if first[place] != last[place]), most)
    return first[:length] if length >= LEAST else ()


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the first tokens, which any number of rows can go on from.

    Attributes:
        ids: the tokens.
        kept: transformers' cache of one row.
    """

    ids: tuple[int, ...]
    kept: Any

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: Sequence[int], device: torch.device) -> Prefix:
        """Runs them through a model or its base."""
        from transformers import DynamicCache

        kept = DynamicCache()
        model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=kept, use_cache=True)
        return cls(tuple(ids), kept)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, count: int) -> Any:
        """A cache of so many rows, to be used up."""
        kept = copy.deepcopy(self.kept)
        kept.batch_repeat_interleave(count)
        return kept
