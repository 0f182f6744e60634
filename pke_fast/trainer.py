"""The trainer: losses and steps over the layers that the selected columns reach; the layers below run once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pke_fast.batches import Batch, pack
from pke_fast.columns import Columns, gradients_into
from pke_fast.config import PKEConfig
from pke_fast.detectors import Detectors, Pull, wanted
from pke_fast.encoding import Encoded
from pke_fast.errors import EditError
from pke_fast.objective import answer_loss, locality_loss
from pke_fast.pace import BEFORE, Pace, in_flight, told_once
from pke_fast.ranks import ALONE, Ranks
from pke_fast.strength import LOUDER, WHOLE, answers_begun, beginnings
from pke_fast.structure import Structure
from pke_fast.tape import Tape, record

T = TypeVar("T")

LR_OF_RMS = 0.01  # of the old values' rms, projection by projection; tuned on SmolLM2-135M
GENTLY = 0.3  # of it after detectors: large steps would undo what they know before they learn it anew
GENTLER = "lower lr (--set lr=...), or load the model in fp32 or bf16"
BEGIN_MINIBATCHES = 2  # of each side, that detectors are aimed and weighed by
SAMPLE = 256  # requests and pairs that the losses before and after are measured on
WATCHED = 2048  # of each that detectors are made from, where there are any and steps reach no more


@dataclass(frozen=True)
class Step:
    """The losses of one step's minibatch, before its update: means over requests and over locality pairs, the KL to
    what the steps hold: the model that they began with."""

    step: int
    loss: float
    edit: float
    kl: float


@dataclass(frozen=True)
class Losses:
    """Mean loss of the safe answers over requests, and mean KL over locality pairs.

    Both weigh an answer's first token by `first_token_weight`; the KL has that at the prompts' held tokens added to it,
    weighed by `w_prompt`.
    """

    edit: float
    kl: float


@dataclass(eq=False)
class _Minibatch:
    """A fixed set of sequences on their tapes.

    Attributes:
        number: which of its side it is, from 0.
        sequences: this rank's share of them.
        size: how many there are on all ranks.
        tapes: their micro-batches.
        base: for locality pairs, the unedited model's head input at each sequence's supervised positions, [n, d] each.
        held: the same with the detectors, as the steps hold it; `base` itself where there are none.
    """

    number: int
    sequences: list[Encoded]
    size: int
    tapes: list[Tape]
    base: list[Tensor]
    held: list[Tensor]


class Trainer:
    """What enters the lowest edited layer, and the losses of one edit.

    The layers below the lowest edited one run once, here; every step replays the layers above.

    Args:
        requests: prompts with their safe answers.
        locality: benign prompts with the answers that must not move; may be empty.
        pace: how many tokens at once, and how many layers keep their graph in a step.
        ranks: each takes its share of every minibatch; the losses and the columns' gradients are added up.
        detectors: see the MLPs' inputs of the unedited model on all sequences that run, those of the requests in
            `edit_loss`.
        beginning: the tape that the sequences' own go on from.
    """

    def __init__(
        self,
        structure: Structure,
        columns: Sequence[Columns],
        requests: Sequence[Encoded],
        locality: Sequence[Encoded],
        config: PKEConfig,
        pad_id: int,
        advance: Callable[[int], None] = lambda _n: None,
        *,
        pace: Pace | None = None,
        ranks: Ranks = ALONE,
        detectors: Detectors | None = None,
        beginning: Tape | None = None,
    ) -> None:
        self.structure, self.columns, self.config, self.ranks = structure, columns, config, ranks
        self._watching = detectors.watching if detectors else None
        self.pace = pace or Pace.unplanned(config)
        self._first = min(column.layer for column in columns)
        self._most_lr = [LR_OF_RMS * column.rms if config.lr is None else config.lr for column in columns]
        self.gain = 0.0  # of the detectors; 0 where there are none
        self.start: dict[str, tuple[Tensor, Tensor]] = {}  # what they are, by column: rows, values
        self._shuffle = random.Random(config.seed)
        self._pad_id = pad_id
        self._place = BEFORE  # in the whole edit: a step's is its number, what comes before the steps lies below 0
        self._beginning = beginning
        self.requests: list[_Minibatch] = []
        self.locality: list[_Minibatch] = []
        self._add(self.requests, requests, config.batch_size, advance, base=False)
        self._add(self.locality, locality, config.locality_batch_size, advance, base=True)

    def _add(
        self, to: list[_Minibatch], sequences: Sequence[Encoded], size: int, advance: Callable[[int], None], base: bool
    ) -> None:
        order = self._shuffle.sample(range(len(sequences)), len(sequences))
        order = order[: _reached(len(order), size, self.config)]
        for start in range(0, len(order), size):
            chosen = [sequences[i] for i in order[start : start + size]]
            minibatch = _Minibatch(len(to), list(self.ranks.mine(chosen)), len(chosen), [], [], [])
            self._slower_if_it_must(partial(self._record, minibatch, base), "running the layers below")
            to.append(minibatch)
            advance(len(chosen))

    @torch.no_grad()
    def _record(self, minibatch: _Minibatch, base: bool) -> None:
        minibatch.tapes = []
        for batch in pack(minibatch.sequences, self.pace.tokens, self._pad_id):
            with in_flight(batch):
                tape = record(self.structure, batch, self._first, after=self._beginning)
                minibatch.tapes.append(tape)
        if base:
            minibatch.base = minibatch.held = self._head_inputs(minibatch)

    @torch.no_grad()
    def _head_inputs(self, minibatch: _Minibatch) -> list[Tensor]:
        """The head's input at each sequence's supervised positions, with the weights as they are."""
        found: dict[int, Tensor] = {}
        for tape in minibatch.tapes:
            rows = tape.batch.rows
            with in_flight(tape.batch), self._watched(tape, True, minibatch):
                top = tape.supervised(tape.run())
            found.update(zip(rows, top.split([len(minibatch.sequences[row].supervised) for row in rows]), strict=True))
        return [found[row] for row in range(len(minibatch.sequences))]

    def _slower_if_it_must(self, work: Callable[[], T], doing: str) -> T:
        """What `work` returns; where memory runs out, or did so here before an interruption, with smaller micro-batches
        from there on."""
        self._place += 1
        anew = self.pace.resume_at(self._place)

        def attempt() -> T:
            nonlocal anew
            if anew:
                for column in self.columns:
                    column.forget_gradient()
                self._record_anew()
            anew = True
            return work()

        return self.pace.slower_if_it_must(attempt, doing, self._place)

    def resume(self, steps: int) -> None:
        """Goes on after so many steps, which an interrupted run made."""
        self._place = steps - 1

    def _record_anew(self) -> None:
        for minibatch in (*self.requests, *self.locality):
            self._record(minibatch, base=False)  # the layers below are as they were; so is what was kept as base

    def _loss(self, minibatch: _Minibatch, base: bool, scale: float = 0.0) -> Tensor:
        """The minibatch's mean loss on this rank, on the device; `scale` times its gradient is added up, if not 0."""
        total = torch.zeros((), device=self.structure.head_device)
        for tape in minibatch.tapes:
            with in_flight(tape.batch):
                total += self._tape_loss(tape, minibatch, base, scale)
        return total

    def _tape_loss(self, tape: Tape, minibatch: _Minibatch, base: bool, scale: float) -> Tensor:
        weights = self._weights(tape.batch) / minibatch.size
        if base:
            states = minibatch.held if scale else minibatch.base  # what is pulled to, or measured from
            to = torch.cat([states[row] for row in tape.batch.rows])
            loss_of = partial(locality_loss, self.structure, base_hidden=to, weights=weights)
        else:
            loss_of = partial(answer_loss, self.structure, batch=tape.batch, weights=weights)
        if scale:
            return tape.there_and_back(loss_of, self.pace.editing_kept, scale)
        with torch.no_grad(), self._watched(tape, base, minibatch):
            return loss_of(tape.supervised(tape.run()))

    def _weights(self, batch: Batch) -> Tensor:
        return batch.answer_weights(self.config.first_token_weight, prompt_weight=self.config.w_prompt)

    def _watched(self, tape: Tape, base: bool, minibatch: _Minibatch) -> AbstractContextManager[None]:
        watching = self._watching
        return watching(tape.batch, base, minibatch.number) if watching else nullcontext()

    def begin(self, detectors: Detectors, advance: Callable[[int], None]) -> float:
        """Makes the detectors, from what was watched; the gain that they were given."""
        self._watching = None
        few = range(min(BEGIN_MINIBATCHES, max(len(self.requests), len(self.locality))))
        doing = "beginning with detectors"

        def there_and_back(pull: Pull) -> None:
            pull.forget()
            with gradients_into(self.columns):
                for number in few:
                    minibatch = self._next(self.requests, number)
                    for tape in minibatch.tapes:
                        with pull.watching(tape.batch):
                            self._loss(replace(minibatch, tapes=[tape]), False, 1.0)
            for column in self.columns:
                column.forget_gradient()

        def losses() -> Tensor:
            total = torch.zeros(2, device=self.structure.head_device)
            for number in few:
                total[0] += self._loss(self._next(self.requests, number), False)
                total[1] += self._loss(self._next(self.locality, number), True)
            return total

        def towards(pull: Pull) -> None:
            self._slower_if_it_must(partial(there_and_back, pull), doing)

        def loss() -> float:
            total = self._slower_if_it_must(losses, doing)  # nothing is sent within: a rank may be alone in it
            self.ranks.add_up(total)
            edit, kl = (total / len(few)).tolist()
            return float(self.config.w_edit * edit + self.config.w_kl * kl)

        gain = detectors.begin(towards, loss, advance)
        self.gain = gain
        if gain:
            self.hold()
        return gain

    def hold(self) -> None:
        """From here on, steps hold the locality pairs as they are with the weights as they are."""
        self.start = {column.name: column.moved() for column in self.columns}
        coming = self.locality[: self.config.num_steps]
        self._place = -2  # its own is the last before the steps, in a run that goes on too
        held = self._slower_if_it_must(lambda: [self._head_inputs(one) for one in coming], "running what is held")
        for minibatch, states in zip(coming, held, strict=True):
            minibatch.held = states

    def edit_loss(self, advance: Callable[[int], None] = lambda _n: None) -> float:
        """The mean loss of the safe answers over a sample of the requests, with the weights as they are; all of the
        requests run while detectors watch."""
        return self._mean_loss(self.requests, False, advance)

    def sampled(self) -> tuple[int, int]:
        """On how many requests and pairs the losses are measured."""
        requests, pairs = (sum(m.size for m in _sample(side)) for side in (self.requests, self.locality))
        return requests, pairs

    def _mean_loss(self, minibatches: list[_Minibatch], base: bool, advance: Callable[[int], None]) -> float:
        sample = _sample(minibatches)
        total = torch.zeros((), device=self.structure.head_device)
        for minibatch in minibatches if self._watching else sample:
            loss = self._slower_if_it_must(partial(self._loss, minibatch, base), "measuring the losses")
            if minibatch.number < len(sample):
                total += minibatch.size * loss
            advance(minibatch.size)
        self.ranks.add_up(total)
        return float(total) / max(1, sum(minibatch.size for minibatch in sample))

    def final_losses(self, advance: Callable[[int], None] = lambda _n: None) -> Losses:
        """Both losses over a sample of each side, with the weights as they will stay.

        Raises:
            EditError: one of them isn't finite.
        """
        losses = Losses(self.edit_loss(advance), self._mean_loss(self.locality, True, advance))
        if not math.isfinite(losses.edit + losses.kl):
            told = f"the edited model's loss is {losses.edit}, its KL {losses.kl}; the weights were put back"
            raise EditError(told, do=GENTLER)
        return losses

    def step(self, number: int, *, kl_gradient: bool = True) -> Step:
        """One optimiser step on the next minibatch of requests and of locality pairs.

        Args:
            number: 0 for the first step; decides which minibatches are next.
            kl_gradient: False computes the KL without letting it pull (dinm-parity).

        Raises:
            EditError: the loss or a gradient isn't finite. The columns have taken the step then: they are to be put
                back (`put_back_on_failure`).
        """
        self._place = number - 1
        work = partial(self.gradients, number, kl_gradient=kl_gradient)
        values = self._slower_if_it_must(work, f"making step {number + 1}")
        self.update(number)
        edit, kl, finite = values.tolist()  # the one time that a step waits for the device
        loss = self.config.w_edit * edit + self.config.w_kl * kl
        if not math.isfinite(loss) or not finite:
            raise EditError(
                f"the loss became {loss} at step {number + 1}; the weights were put back",
                do=GENTLER,
            )
        return Step(number + 1, loss, edit, kl)

    def gradients(self, number: int, *, kl_gradient: bool = True) -> Tensor:
        """The losses of a step, fp32 [3] on the device: edit, KL, and 1 where all is finite; the columns get their
        gradients. Nothing here waits for the device."""
        config = self.config
        kl = torch.zeros((), device=self.structure.head_device)
        with gradients_into(self.columns):
            edit = self._loss(self._next(self.requests, number), False, config.w_edit)
            if self.locality and config.w_kl:
                kl = self._loss(self._next(self.locality, number), True, config.w_kl if kl_gradient else 0.0)
        losses = torch.stack([edit, kl])
        if self.ranks.size > 1:
            self.ranks.add_up(losses, *(column.grad for column in self.columns))
        finite = torch.stack([column.finite().to(losses.device) for column in self.columns]).all()
        return torch.cat([losses, finite.float()[None]])

    def update(self, number: int) -> None:
        """The step's update from the gradients, in place; nothing waits for the device."""
        left = self._lr_left(number)
        for column, most in zip(self.columns, self._most_lr, strict=True):
            column.update(self.config, left * most)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Those that are tried."""
        return LOUDER if self.gain else WHOLE

    def stretch(self, by: float) -> None:
        """Gives the live weights a strength: so many times what the detectors say, or without them the change."""
        for column in self.columns:
            if not self.gain:
                column.stretch(by)
            elif column.projection == "down":
                column.amplify(self.start[column.name][0], by)

    def begun_by_strength(self, sequences: Sequence[Encoded], advance: Callable[[int], None]) -> list[int]:
        """How many of the sequences' answers the model begins, at each of `strengths`; the last of these stays."""
        found = torch.zeros(len(self.strengths), device=self.structure.head_device)
        waiting = beginnings(self.ranks.mine(sequences))
        begin = told_once(advance)

        def count() -> None:
            found.zero_()
            told = begin()
            for batch in pack(waiting, self.pace.tokens, self._pad_id):
                with in_flight(batch):
                    found.add_(answers_begun(self.structure, batch, self._first, self.strengths, self.stretch))
                told(len(batch.rows))

        self._slower_if_it_must(count, "finding the strength")
        self.ranks.add_up(found)
        return [int(count) for count in found.tolist()]

    def _lr_left(self, number: int) -> float:
        """The share of the learning rate at a step: from 1 down to `lr_end`; of a default, GENTLY after detectors."""
        end = self.config.lr_end
        most = GENTLY if self.gain and self.config.lr is None else 1.0
        return most * (end + (1 - end) * max(0.0, 1 - number / max(1, self.config.num_steps - 1)))

    def _next(self, minibatches: list[_Minibatch], number: int) -> _Minibatch:
        return minibatches[number % len(minibatches)]


def reached(config: PKEConfig, requests: int, locality: int) -> tuple[int, int]:
    """How many of the requests and of the locality pairs an edit runs at all: those that its steps come to, and so many
    as detectors and losses are made from."""
    return _reached(requests, config.batch_size, config), _reached(locality, config.locality_batch_size, config)


def _reached(count: int, size: int, config: PKEConfig) -> int:
    least = WATCHED if wanted(config) else SAMPLE
    return min(count, size * max(config.num_steps, -(-least // size)))


def _sample(minibatches: list[_Minibatch]) -> list[_Minibatch]:
    """As many as hold SAMPLE sequences. The sequences were shuffled, so the first will do."""
    return minibatches[: -(-SAMPLE // minibatches[0].size)] if minibatches else []
