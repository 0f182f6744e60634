"""What all sequences begin with, such as a chat template's system prompt, runs once; the rest attends to what is kept.

Of short prompts that is often half of the work. Where the layers don't change meanwhile, those below the edited ones
and all of a model that answers, what they keep is made once (`Prefix`); in the edited ones, whenever they run
(`KeysAndValues`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 8  # tokens: fewer save less than they cost


def common(sequences: Sequence[Sequence[int]], least: int = LEAST) -> tuple[int, ...]:
    """The token ids that all begin with, less what would leave one of them empty; () for fewer than `least`, or one
    sequence."""
    if len(sequences) < 2:
        return ()
    ordered = sorted(map(tuple, sequences))
    first, last = ordered[0], ordered[-1]  # these two differ the soonest
    most = min(len(ids) for ids in sequences) - 1
    length = next((place for place in range(most) if first[place] != last[place]), most)
    return first[:length] if length >= least else ()


class Prefix:
    """Keys and values of the first tokens, which any number of rows can go on from.

    Attributes:
        cache: of transformers; a model that runs with it once, on one row, leaves its keys and values here.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self._kept = kept = dict[int, tuple[Tensor, Tensor]]()

        class Keeping(DynamicCache):
            def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
                kept[layer_idx] = key_states, value_states
                return super().update(key_states, value_states, layer_idx, *args, **more)

        self.cache: Any = Keeping()

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: Sequence[int], device: torch.device) -> Prefix:
        """Runs them through a model or its base."""
        prefix = cls()
        model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=prefix.cache, use_cache=True)
        return prefix

    def __len__(self) -> int:
        """How many tokens."""
        return max((keys.shape[-2] for keys, _ in self._kept.values()), default=0)

    def rows(self, count: int) -> Any:
        """A cache of so many rows, to be used up."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, kept in self._kept.items():
            keys, values = (part.expand(count, -1, -1, -1) for part in kept)
            cache.update(keys, values, layer)
        return cache


class KeysAndValues:
    """Stands in for transformers' cache while one layer runs on a beginning, and then on the rows that go on from it.

    Both are within the graph: a gradient of the rows reaches the beginning.
    """

    def __init__(self) -> None:
        self._begun: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T, head size] to attend to: of the beginning, its own; of the rows, both."""
        if self._begun is None:
            self._begun = keys, values
            return keys, values
        begun = (part.expand(len(keys), -1, -1, -1) for part in self._begun)
        whole_keys, whole_values = (torch.cat(pair, -2) for pair in zip(begun, (keys, values), strict=True))
        return whole_keys, whole_values
