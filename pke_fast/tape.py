"""The tape: the model's own forward recorded once, then its upper layers replayed, with or without gradients.

A recorded call is replayed as it came: nothing of a family's signature is known here. Only the hidden state that enters
each layer is kept; everything inside a layer is made again when the layer is replayed and is gone after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import Batch
from pke_fast.structure import Structure, first_tensor, hooks, replaced_forward, split_hidden


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one decoder layer's call, less its hidden state."""

    positional: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tape:
    """One micro-batch's pass through the layers first .. L - 1.

    Attributes:
        first: the lowest layer that can be replayed.
        calls: the calls of the layers first .. L - 1.
        hidden: what entered them, [B, T, d] each; only the first of them where the others weren't asked for.
        top: what the last layer returned, [B, T, d]; None likewise.
    """

    structure: Structure
    batch: Batch
    first: int
    calls: list[Call]
    hidden: list[Tensor]
    top: Tensor | None

    def replay(self, layer: int, hidden: Tensor) -> Tensor:
        """What `layer` returns for `hidden` [B, T, d], all else as it was recorded."""
        call = self.calls[layer - self.first]
        module = self.structure.layers[layer]
        if call.positional:
            return first_tensor(module(hidden, *call.args, **call.kwargs))
        return first_tensor(module(*call.args, hidden_states=hidden, **call.kwargs))

    def run(self, hidden: Tensor | None = None) -> Tensor:
        """The last layer's output from the hidden state that entered layer `first`."""
        hidden = self.hidden[0] if hidden is None else hidden
        for layer in range(self.first, len(self.structure.layers)):
            hidden = self.replay(layer, hidden)
        return hidden

    def supervised(self, top: Tensor) -> Tensor:
        """The head's input [N, d] at the batch's supervised positions, from the last layer's output."""
        return self.structure.finish(top.flatten(0, 1).index_select(0, self.batch.positions))


@torch.no_grad()
def record(structure: Structure, batch: Batch, first: int = 0, *, upper: bool = True) -> Tape:
    """Runs the model's own forward, without its logits, and records the layers from `first` on.

    Args:
        upper: run the layers from `first` on and keep what enters each. Without it they are passed over: only their
            calls and the first one's hidden state are kept (the prefix cache of an edit, which replays them anyway).
    """
    batch = batch.to(structure.device)
    calls: list[Call] = []
    hidden_states: list[Tensor] = []
    top: list[Tensor] = []

    def keep_call(_module: Any, args: Any, kwargs: Any) -> None:
        hidden, rest, named = split_hidden(args, kwargs)
        calls.append(Call(bool(args), rest, named))
        if upper or not hidden_states:
            hidden_states.append(hidden)

    handles = [layer.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in list(structure.layers)[first:]]
    handles.append(structure.layers[-1].register_forward_hook(lambda _m, _a, output: top.append(first_tensor(output))))
    with hooks(*handles), _passed_over(structure, len(structure.layers) if upper else first):
        structure.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return Tape(structure, batch, first, calls, hidden_states, top[0] if upper else None)


@contextmanager
def _passed_over(structure: Structure, first: int) -> Iterator[None]:
    """The layers from `first` on return their hidden state untouched."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, _, _ = split_hidden(args, kwargs)
        return (hidden,) if structure.layers_return_tuples else hidden

    with ExitStack() as stack:
        for layer in list(structure.layers)[first:]:
            stack.enter_context(replaced_forward(layer, forward))
        yield
