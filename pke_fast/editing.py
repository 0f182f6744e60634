"""The edit: losses and steps over the layers that the selected columns reach, until the safe answers are likely."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import pack
from pke_fast.columns import Columns, gradients_into, put_back_on_failure
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded
from pke_fast.errors import EditError
from pke_fast.objective import answer_loss, locality_loss
from pke_fast.patch import LayerPatch
from pke_fast.structure import Structure
from pke_fast.tape import Tape, record

LR_OF_RMS = 0.01  # tuned on SmolLM2-135M, whose down projections have an rms of 0.19
GENTLER = "lower lr (--set lr=...), or load the model in fp32 or bf16"
STEPS = "Editing the hot spots"  # the stage that advances by steps
STOP_WINDOW = 4  # steps in the running means that stop an edit


@dataclass(frozen=True)
class Step:
    """The losses of one step's minibatch, before its update: means over requests and over locality pairs."""

    step: int
    loss: float
    edit: float
    kl: float


@dataclass(frozen=True)
class Losses:
    """Mean loss of the safe answers over all requests, and mean KL over all locality pairs.

    Both weigh an answer's first token by `first_token_weight`.
    """

    edit: float
    kl: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an edit did.

    Attributes:
        layers: old and new columns, as a patch keeps them.
        steps: the learning curve.
        before, after: the losses over everything, `after` with the weights in the model's own dtype.
        stopped: why it stopped, in words.
    """

    layers: tuple[LayerPatch, ...]
    steps: tuple[Step, ...]
    before: Losses
    after: Losses
    stopped: str


@dataclass(frozen=True, eq=False)
class _Minibatch:
    """A fixed set of sequences on their tapes; for locality pairs, with the unedited model's hidden states."""

    tapes: list[Tape]
    base: list[Tensor]
    size: int


class Trainer:
    """The prefix cache and the losses of one edit.

    The layers below the lowest edited one run once, here; every step replays the layers above.

    Args:
        requests: prompts with their safe answers.
        locality: benign prompts with the answers that must not move; may be empty.
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
    ) -> None:
        self.structure, self.columns, self.config = structure, columns, config
        self._first = min(column.layer for column in columns)
        squares = torch.cat([column.old.flatten() for column in columns]).square()
        self._default_lr = LR_OF_RMS * float(squares.mean().sqrt())
        self._shuffle = torch.Generator().manual_seed(config.seed)
        self._pad_id, self._advance = pad_id, advance
        self.requests = self._minibatches(requests, config.batch_size, base=False)
        self.locality = self._minibatches(locality, config.locality_batch_size, base=True)

    @torch.no_grad()
    def _minibatches(self, sequences: Sequence[Encoded], size: int, base: bool) -> list[_Minibatch]:
        order = torch.randperm(len(sequences), generator=self._shuffle).tolist()
        minibatches = []
        for start in range(0, len(order), size):
            chosen = [sequences[i] for i in order[start : start + size]]
            batches = pack(chosen, self.config.micro_batch_tokens, self._pad_id)
            tapes = [record(self.structure, batch, self._first, upper=False) for batch in batches]
            hidden = [tape.supervised(tape.run()) for tape in tapes] if base else []
            minibatches.append(_Minibatch(tapes, hidden, len(chosen)))
            self._advance(len(chosen))
        return minibatches

    def _edit_loss(self, minibatch: _Minibatch, scale: float) -> float:
        """Mean loss of the safe answers; with gradients enabled, scale times its gradient is added up."""
        total = 0.0
        for tape in minibatch.tapes:
            weights = tape.batch.answer_weights(self.config.first_token_weight)
            loss = answer_loss(self.structure, tape.supervised(tape.run()), tape.batch, weights) / minibatch.size
            if torch.is_grad_enabled() and scale:
                (loss * scale).backward()
            total += float(loss.detach())
        return total

    def _locality_loss(self, minibatch: _Minibatch, scale: float) -> float:
        """Mean KL to the unedited model on the locality answers; with gradients enabled, likewise."""
        total = 0.0
        for tape, base in zip(minibatch.tapes, minibatch.base, strict=True):
            weights = tape.batch.answer_weights(self.config.first_token_weight)
            loss = locality_loss(self.structure, tape.supervised(tape.run()), base, weights) / minibatch.size
            if torch.is_grad_enabled() and scale:
                (loss * scale).backward()
            total += float(loss.detach())
        return total

    def edit_loss(self, advance: Callable[[int], None] = lambda _n: None) -> float:
        """The mean loss of the safe answers over all requests, with the weights as they are."""
        return self._over_all(self.requests, self._edit_loss, advance)

    @torch.no_grad()
    def _over_all(
        self,
        minibatches: Sequence[_Minibatch],
        loss: Callable[[_Minibatch, float], float],
        advance: Callable[[int], None],
    ) -> float:
        total = 0.0
        for minibatch in minibatches:
            total += loss(minibatch, 0.0) * minibatch.size
            advance(minibatch.size)
        return total / max(1, sum(minibatch.size for minibatch in minibatches))

    def final_losses(self, advance: Callable[[int], None] = lambda _n: None) -> Losses:
        """Both losses over everything, with the weights as they will stay.

        Raises:
            EditError: one of them isn't finite.
        """
        losses = Losses(self.edit_loss(advance), self._over_all(self.locality, self._locality_loss, advance))
        if not math.isfinite(losses.edit + losses.kl):
            raise EditError(f"the edited model's loss is {losses.edit}; the weights were put back", do=GENTLER)
        return losses

    def step(self, number: int, *, kl_gradient: bool = True) -> Step:
        """One optimiser step on the next minibatch of requests and of locality pairs.

        Args:
            number: 0 for the first step; decides which minibatches are next.
            kl_gradient: False computes the KL without letting it pull (dinm-parity).

        Raises:
            EditError: the loss or a gradient isn't finite; the weights are as before this step.
        """
        config = self.config
        with torch.enable_grad(), gradients_into(self.columns):
            edit = self._edit_loss(self._next(self.requests, number), config.w_edit)
            kl = 0.0
            if self.locality and config.w_kl:
                with torch.set_grad_enabled(kl_gradient):
                    kl = self._locality_loss(self._next(self.locality, number), config.w_kl)
        loss = config.w_edit * edit + config.w_kl * kl
        if not math.isfinite(loss) or not all(column.finite() for column in self.columns):
            raise EditError(
                f"the loss became {loss} at step {number + 1}; the weights were put back",
                do=GENTLER,
            )
        for column in self.columns:
            column.update(config, self._lr(number))
        return Step(number + 1, loss, edit, kl)

    def _lr(self, number: int) -> float:
        """The learning rate of a step: from `lr` down to `lr_end` of it, linearly."""
        config = self.config
        left = config.lr_end + (1 - config.lr_end) * max(0.0, 1 - number / max(1, config.num_steps - 1))
        return left * (self._default_lr if config.lr is None else config.lr)

    def _next(self, minibatches: list[_Minibatch], number: int) -> _Minibatch:
        return minibatches[number % len(minibatches)]


def _good_enough(recent: Sequence[Step], config: PKEConfig) -> bool:
    edit, kl = (sum(values) / STOP_WINDOW for values in ([s.edit for s in recent], [s.kl for s in recent]))
    return len(recent) == STOP_WINDOW and edit < config.stop_loss and kl < config.stop_kl


def edit_columns(
    structure: Structure,
    hot_spots: Mapping[int, Tensor],
    requests: Sequence[Encoded],
    locality: Sequence[Encoded],
    config: PKEConfig,
    *,
    pad_id: int,
    stage: Callable[[str, int], Any],
) -> Outcome:
    """Changes the hot spots' columns in place until the safe answers are likely, holding the locality answers.

    Args:
        hot_spots: by layer, the neurons to change, int64 ascending.
        stage: `Stages.stage`.

    Raises:
        EditError: a loss became NaN. The weights are then as they were, as after any other exception.
    """
    columns = [Columns(structure, layer, neurons) for layer, neurons in sorted(hot_spots.items())]
    with put_back_on_failure(columns):
        with stage("Running the layers below, once", len(requests) + len(locality)) as advance:
            trainer = Trainer(structure, columns, requests, locality, config, pad_id, advance)
        with stage("Measuring the losses before", len(requests)) as advance:
            before = Losses(trainer.edit_loss(advance), 0.0)  # the KL of a model to itself
        steps: list[Step] = []
        stopped = f"all {config.num_steps} steps were made"
        with stage(STEPS, config.num_steps) as advance:
            for number in range(config.num_steps):
                steps.append(trainer.step(number))
                advance(1)
                if _good_enough(steps[-STOP_WINDOW:], config):
                    stopped = f"over {STOP_WINDOW} steps, the losses fell below stop_loss and stop_kl"
                    break
        with stage("Measuring the losses after", len(requests) + len(locality)) as advance:
            after = trainer.final_losses(advance)
        return Outcome(tuple(column.patch() for column in columns), tuple(steps), before, after, stopped)
