"""The tape: the model's own forward recorded once up to a layer, then the layers from there on replayed, up and back.

A recorded call is replayed as it came: nothing of a family's signature is known here. Only the hidden state that enters
the first of those layers is kept. On the way up the uppermost layers may keep their graph; the others keep what entered
them alone, run again on the way back, and nothing of a layer is left after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import Batch
from pke_fast.placement import downwards
from pke_fast.structure import Structure, first_tensor, hooks, replaced_forward, split_hidden


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one decoder layer's call, less its hidden state."""

    positional: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tape:
    """One micro-batch, brought to the layer `first`.

    Attributes:
        first: the lowest layer that can be replayed.
        calls: the calls of the layers first .. L - 1.
        entered: what enters layer `first`, [B, T, d]; it needs no gradient.
    """

    structure: Structure
    batch: Batch
    first: int
    calls: list[Call]
    entered: Tensor

    def replay(self, layer: int, hidden: Tensor) -> Tensor:
        """What `layer` returns for `hidden` [B, T, d], all else as it was recorded."""
        call = self.calls[layer - self.first]
        module = self.structure.layers[layer]
        if call.positional:
            return first_tensor(module(hidden, *call.args, **call.kwargs))
        return first_tensor(module(*call.args, hidden_states=hidden, **call.kwargs))

    def outputs(self) -> Iterator[Tensor]:
        """What each layer from `first` on returns, [B, T, d]."""
        hidden = self.entered
        for layer in range(self.first, len(self.structure.layers)):
            hidden = self.replay(layer, hidden)
            yield hidden

    def run(self) -> Tensor:
        """What the last layer returns."""
        hidden = self.entered
        for hidden in self.outputs():  # noqa: B007  the last one counts
            pass
        return hidden

    def supervised(self, top: Tensor) -> Tensor:
        """The head's input [N, d] at the batch's supervised positions, from the last layer's output."""
        return self.structure.finish(top.flatten(0, 1).index_select(0, self.batch.positions.to(top.device)))

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
        states = [self.entered]
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
def record(structure: Structure, batch: Batch, first: int = 0, below: Callable[[Batch], Tensor] | None = None) -> Tape:
    """Runs the model's own forward up to the layer `first`, and records the calls from there on.

    The layers from `first` on are passed over: their calls are kept, not their work.

    Args:
        below: makes what enters `first`, [B, T, d], in place of the layers below it.
    """
    batch = batch.to(structure.device)
    calls: list[Call] = []
    entered: list[Tensor] = []

    def keep_call(_module: Any, args: Any, kwargs: Any) -> None:
        hidden, rest, named = split_hidden(args, kwargs)
        calls.append(Call(bool(args), rest, named))
        if not entered:
            entered.append(hidden)

    upper = list(structure.layers)[first:]
    with (
        hooks(*(layer.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in upper)),
        passed_over(structure, range(0 if below else first, len(structure.layers))),
    ):
        structure.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return Tape(structure, batch, first, calls, below(batch) if below else entered[0])


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
