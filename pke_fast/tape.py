"""The tape: the model's own forward recorded once up to a layer, then the layers from there on replayed, up and back.

A recorded call is replayed as it came: nothing of a family's signature is known here. Only the hidden state that enters
the first of those layers is kept. On the way up the uppermost layers may keep their graph; the others keep what entered
them alone, run again on the way back, and nothing of a layer is left after it.

What all rows begin with, such as a chat template's system prompt, may have a tape of its own, of one row, which theirs
go on from: every layer then runs on the beginning, and on the rest, which attends to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pke_fast.batches import Batch
from pke_fast.module_calls import first_tensor, hooks, replaced_forward, split_hidden
from pke_fast.placement import downwards
from pke_fast.prefix import KeysAndValues, Prefix
from pke_fast.structure import Structure

_CACHE = object()
_IN_BEGINNING: ContextVar[bool] = ContextVar("in_beginning", default=False)


def in_beginning() -> bool:
    """Whether a layer runs now on what rows go on from, so that a batch's positions aren't those of its tokens."""
    return _IN_BEGINNING.get()


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one decoder layer's call, less its hidden state; _CACHE stands for transformers' cache."""

    positional: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, layer: Any, hidden: Tensor, kept: KeysAndValues | None = None) -> Tensor:
        """What the layer returns for `hidden` [B, T, d]; `kept` takes the cache's place."""
        call = self.swapped(_CACHE, kept)
        if self.positional:
            return first_tensor(layer(hidden, *call.args, **call.kwargs))
        return first_tensor(layer(*call.args, hidden_states=hidden, **call.kwargs))

    def swapped(self, old: Any, new: Any) -> Call:
        """The same call with one argument in another's place."""
        args = tuple(new if value is old else value for value in self.args)
        kwargs = {name: new if value is old else value for name, value in self.kwargs.items()}
        return Call(self.positional, args, kwargs)


@dataclass(frozen=True, eq=False)
class Tape:
    """One micro-batch, brought to the layer `first`.

    The hidden state between two layers is [B, T, d]; where it goes on from another tape of P tokens, [1, P + B * T, d].

    Attributes:
        first: the lowest layer that can be replayed.
        calls: the calls of the layers first .. L - 1.
        entered: what enters layer `first`, [B, T, d]; it needs no gradient.
        prefix: what the layers below keep of its tokens, if others are to go on from it.
        after: the tape that it goes on from.
    """

    structure: Structure
    batch: Batch
    first: int
    calls: list[Call]
    entered: Tensor
    prefix: Prefix | None = None
    after: Tape | None = None

    @property
    def lead(self) -> int:
        """How many tokens its rows go on from."""
        return 0 if self.after is None else self.after.entered.shape[1]

    @property
    def nbytes(self) -> int:
        """What it keeps: what enters, its batch, and the arguments of the calls, such as positions and masks."""
        calls = [(call.args, call.kwargs) for call in self.calls]
        kept = [leaf for leaf in tree_leaves([self.entered, vars(self.batch), calls]) if isinstance(leaf, Tensor)]
        return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}.values())

    def _enters(self) -> Tensor:
        """The hidden state that enters layer `first`."""
        if self.after is None:
            return self.entered
        return torch.cat([self.after.entered, self.entered.flatten(0, 1)[None]], 1)

    def replay(self, layer: int, hidden: Tensor) -> Tensor:
        """What `layer` returns for the hidden state, all else as it was recorded."""
        module, nth = self.structure.layers[layer], layer - self.first
        if self.after is None:
            return self.calls[nth].on(module, hidden)
        kept = KeysAndValues()
        token = _IN_BEGINNING.set(True)
        try:
            begun = self.after.calls[nth].on(module, hidden[:, : self.lead], kept)
        finally:
            _IN_BEGINNING.reset(token)
        rows = hidden[0, self.lead :].unflatten(0, self.batch.input_ids.shape)
        rest = self.calls[nth].on(module, rows, kept)
        return torch.cat([begun, rest.flatten(0, 1)[None]], 1)

    def outputs(self) -> Iterator[Tensor]:
        """The hidden state after each layer from `first` on."""
        hidden = self._enters()
        for layer in range(self.first, len(self.structure.layers)):
            hidden = self.replay(layer, hidden)
            yield hidden

    def run(self) -> Tensor:
        """The hidden state after the last layer."""
        hidden = self.entered
        for hidden in self.outputs():  # noqa: B007  the last one counts
            pass
        return hidden

    def supervised(self, top: Tensor) -> Tensor:
        """The head's input [N, d] at the batch's supervised positions, from the last layer's output."""
        places = self.batch.positions.to(top.device) + self.lead
        return self.structure.finish(top.flatten(0, 1).index_select(0, places))

    def there_and_back(
        self, loss_of: Callable[[Tensor], Tensor], kept: int | None = None, scale: float = 1.0
    ) -> Tensor:
        """A loss and its gradient: up through the layers, and back down to the lowest of them.

        Where the gradient goes is the business of taps inside the layers (`columns`, `scoring`), which act only while
        gradients are enabled; layer `first` has one. Nothing is computed for the hidden state that enters it.

        Args:
            loss_of: the loss, a scalar, from the head's input at the supervised positions [N, d].
            kept: how many of the uppermost layers keep their graph on the way up; the others run again on the way
                back, each by itself: one more forward of them, and a memory of what entered each. None: all keep it.
                Those whose weights come and go never do, nor any below them.
            scale: a factor of the gradient.

        Returns:
            the loss, not scaled, detached, on the device.
        """
        top = len(self.structure.layers)
        keep = max(self.first, self.structure.lowest_kept, 0 if kept is None else top - kept)
        states = [self._enters()]
        with torch.no_grad():
            for layer in range(self.first, keep):
                states.append(self.replay(layer, states[-1]))
        with torch.enable_grad():
            hidden = states.pop()
            if keep > self.first:
                hidden = hidden.detach().requires_grad_()
            entered = hidden
            for layer in range(keep, top):
                hidden = self.replay(layer, hidden)
            loss = loss_of(self.supervised(hidden))
            del hidden
            (loss * scale).backward()
            with downwards(self.structure.layers, self.first):
                for layer in reversed(range(self.first, keep)):
                    grad, state = entered.grad, states.pop()
                    entered = state if layer == self.first else state.detach().requires_grad_()
                    self.replay(layer, entered).backward(grad)
        return loss.detach()


@torch.no_grad()
def record(
    structure: Structure,
    batch: Batch,
    first: int = 0,
    *,
    begins: bool = False,
    after: Tape | None = None,
    known: Tensor | None = None,
) -> Tape:
    """Runs the model's own forward up to the layer `first`, and records the calls from there on.

    The layers from `first` on are passed over: their calls are kept, not their work.

    Args:
        begins: the batch is one row, which others will go on from.
        after: what the batch's rows go on from; `first` is the same.
        known: what enters the layer `first`, [B, T, d], where it is known: the layers below are passed over too.
    """
    batch = batch.to(structure.device)
    calls: list[Call] = []
    entered: list[Tensor] = []
    mask, prefix = batch.attention_mask, Prefix() if begins else None
    cache = None if prefix is None else prefix.cache
    if after is not None:
        assert after.prefix is not None
        cache = after.prefix.once()
        mask = torch.cat([mask.new_ones(len(mask), len(after.prefix)), mask], 1)

    def keep_call(_module: Any, args: Any, kwargs: Any) -> None:
        hidden, rest, named = split_hidden(args, kwargs)
        call = Call(bool(args), rest, named)
        calls.append(call if cache is None else call.swapped(cache, _CACHE))
        if not entered:
            entered.append(hidden)

    upper = list(structure.layers)[first:]
    with (
        hooks(*(layer.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in upper)),
        passed_over(structure, range(first if known is None else 0, len(structure.layers))),
    ):
        cached = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        structure.base(input_ids=batch.input_ids, attention_mask=mask, **cached)
    return Tape(structure, batch, first, calls, entered[0] if known is None else known, prefix, after)


def record_whole(structure: Structure, batch: Batch, rest: Batch, first: int, beginning: Tape) -> Tape:
    """The tape of whole rows that begin as another tape's one: the layers below `first` run on the rest of them alone.

    Args:
        rest: the batch's rows after the beginning.
    """
    entered = record(structure, rest, first, after=beginning).entered
    known = torch.cat([beginning.entered.expand(len(entered), -1, -1), entered], 1)
    return record(structure, batch, first, known=known)


@contextmanager
def passed_over(structure: Structure, layers: Iterable[int]) -> Iterator[None]:
    """These layers return their hidden state untouched."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, _, _ = split_hidden(args, kwargs)
        return (hidden, None) if structure.layers_return_tuples else hidden  # None: where older models have their cache

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(structure.layers[layer], forward))
        yield
