"""What all sequences begin with, such as a chat template's system prompt, runs once; the rest attends to what is kept.

Of short prompts that is often half of the work. Where the layers don't change meanwhile, those below the edited ones
and all of a model that answers, what they keep is made once (`Prefix`); in the edited ones, whenever they run
(`KeysAndValues`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
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
        cache: of transformers; a model that runs with it once, on one row, leaves its keys and values there.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()

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

    @property
    def _kept(self) -> dict[int, Pair]:
        if hasattr(self.cache, "layers"):
            pairs = [(layer.keys, layer.values) for layer in self.cache.layers]
        else:  # older versions of transformers
            pairs = list(zip(self.cache.key_cache, self.cache.value_cache, strict=True))
        return {layer: pair for layer, pair in enumerate(pairs) if isinstance(pair[0], Tensor)}

    def rows(self, count: int) -> Any:
        """A cache of so many rows, to be used up."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in self._kept.items():
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), layer)
        return cache

    def once(self) -> Any:
        """A cache for one pass of any number of rows, which keeps nothing of them."""
        from transformers import DynamicCache

        cache = _once()()
        cache.begun = self._kept
        for layer, (keys, values) in cache.begun.items():
            DynamicCache.update(cache, keys, values, layer)  # so that it can tell how many tokens there were
        return cache


@functools.cache
def _once() -> Any:
    from transformers import DynamicCache

    class Once(DynamicCache):
        begun: dict[int, Pair]

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Pair:
            return _after(self.begun[layer_idx], (key_states, value_states))

    return Once


def _after(begun: Pair, rest: Pair) -> Pair:
    """Keys and values of a beginning's one row, and of the rows that go on from it."""
    keys, values = (torch.cat([a.expand(len(b), -1, -1, -1), b], -2) for a, b in zip(begun, rest, strict=True))
    return keys, values


class KeysAndValues:
    """Stands in for transformers' cache while one layer runs on a beginning, and then on the rows that go on from it.

    Both are within the graph: a gradient of the rows reaches the beginning.
    """

    def __init__(self) -> None:
        self._begun: Pair | None = None

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> Pair:
        """Keys and values [B, heads, T, head size] to attend to: of the beginning, its own; of the rows, both."""
        if self._begun is None:
            self._begun = keys, values
            return keys, values
        return _after(self._begun, (keys, values))

    def get_seq_length(self, _layer: int = 0) -> int:
        """How many tokens there were before, as some layers ask."""
        return 0 if self._begun is None else self._begun[0].shape[-2]

    def get_usable_length(self, _new: int, _layer: int = 0) -> int:
        """The same, as Phi-3 asks in transformers 4.46."""
        return self.get_seq_length()
