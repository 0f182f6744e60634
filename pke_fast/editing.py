"""The edit, detectors, steps until the safe answers are likely, strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pke_fast.beginning import beginning_of
from pke_fast.columns import Columns, columns_of, put_back_on_failure
from pke_fast.config import PKEConfig
from pke_fast.detectors import Detectors
from pke_fast.encoding import Encoded, shared
from pke_fast.layer_patch import LayerPatch
from pke_fast.pace import Pace
from pke_fast.ranks import ALONE, Ranks
from pke_fast.resume import NOWHERE, Snapshot
from pke_fast.strength import Tried, least, refusing
from pke_fast.structure import Structure
from pke_fast.trainer import Losses, Step, Trainer, reached

STEPS = "Editing the hot spots"  # the stage that advances by steps
STOP_WINDOW = 4  # steps in the running means that stop an edit


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an edit did.

    Attributes:
        layers: old and new weights of the hot spots, as a patch keeps them.
        steps: the learning curve.
        before, after: the losses over at least SAMPLE of either side, or all, `after` with the weights in the model's
            own dtype.
        stopped: why it stopped, in words.
        strength: what the change, or what the detectors say, was multiplied by.
        tried: the strengths that it was chosen from; none where it wasn't sought.
        gain: that the detectors were given; 0 where the edit began without them.
    """

    layers: tuple[LayerPatch, ...]
    steps: tuple[Step, ...]
    before: Losses
    after: Losses
    stopped: str
    strength: float = 1.0
    tried: tuple[Tried, ...] = ()
    gain: float = 0.0


def _ended(steps: Sequence[Step], config: PKEConfig) -> bool:
    return len(steps) >= config.num_steps or _good_enough(steps[-STOP_WINDOW:], config)


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
    pace: Pace | None = None,
    ranks: Ranks = ALONE,
    snapshot: Snapshot = NOWHERE,
    unseen: Sequence[Encoded] = (),
) -> Outcome:
    """Changes the hot spots' columns in place until the safe answers are likely, holding the locality answers.

    Args:
        hot_spots: by layer, the neurons to change, int64 ascending.
        stage: `Stages.stage`.
        pace, ranks: as for `Trainer`.
        snapshot: keeps the steps so far, and goes on from them. The first rank's: all have the same columns.
        unseen: harmful requests with safe answers that aren't edited on: by them the strength is found.

    Raises:
        EditError: a loss became NaN. The weights are then as they were, as after any other exception.
    """
    columns = columns_of(structure, hot_spots, config.edited)
    with put_back_on_failure(columns):
        kept = ranks.from_first(snapshot.load)
        counts = reached(config, len(requests), len(locality))
        with stage("Running the layers below, once", sum(counts)) as advance:
            every = [*requests, *locality]
            beginning = beginning_of(structure, every, min(c.layer for c in columns), pad_id)
            common = len(shared(every))
            begun = 0 if beginning is None else common
            detectors = None
            if locality and kept is None:
                detectors = Detectors(structure, columns, config, ranks, common - begun)
            trainer = Trainer(
                structure,
                columns,
                [sequence.after(begun) for sequence in requests],
                [sequence.after(begun) for sequence in locality],
                config,
                pad_id,
                advance,
                pace=pace,
                ranks=ranks,
                detectors=detectors,
                beginning=beginning,
            )
        requests_sampled, pairs_sampled = trainer.sampled()
        with stage("Measuring the losses before", counts[0] if detectors else requests_sampled) as advance:
            before = Losses(trainer.edit_loss(advance), 0.0)  # the KL of a model to itself
        if detectors:
            with stage("Beginning with detectors", detectors.stages) as advance:
                trainer.begin(detectors, advance)
        steps = _resumed(columns, trainer, kept)
        learnt = not steps and not trainer.gain and before.edit < config.stop_loss
        with stage(STEPS, 0 if learnt else config.num_steps) as advance:
            if steps:
                advance(len(steps))
            while not learnt and not _ended(steps, config):
                steps.append(trainer.step(len(steps)))
                advance(1)
                if ranks.first:
                    snapshot.save(partial(_state, trainer, steps), done=_ended(steps, config))
        stopped = f"all {config.num_steps} steps were made"
        if learnt:  # Adam's first step is as long for a small gradient as for a large one: it would unlearn
            stopped = "before any step the loss of the safe answers was below stop_loss: nothing was changed"
        elif _good_enough(steps[-STOP_WINDOW:], config):
            stopped = f"over {STOP_WINDOW} steps, the losses fell below stop_loss and stop_kl"
        strength = config.strength if config.norm_constraint is None else 1.0
        tried: tuple[Tried, ...] = ()
        if strength is None and unseen and not learnt:
            held = refusing(locality, unseen)
            with stage("Finding the strength", len(ranks.mine(unseen)) + len(ranks.mine(held))) as advance:
                harmful, harmless = (trainer.begun_by_strength(side, advance) for side in (unseen, held))
            tried = tuple(
                Tried(by, of_unseen, len(unseen), of_held, len(held))
                for by, of_unseen, of_held in zip(trainer.strengths, harmful, harmless, strict=True)
            )
            shares = [one.refused / one.unseen for one in tried]
            strength = least(trainer.strengths, shares, config.unseen_refused)
        strength = 1.0 if strength is None else strength
        trainer.stretch(strength)
        with stage("Measuring the losses after", requests_sampled + pairs_sampled) as advance:
            after = trainer.final_losses(advance)
        layers = tuple(column.patch() for column in columns)
        return Outcome(layers, tuple(steps), before, after, stopped, strength, tried, trainer.gain)


def _state(trainer: Trainer, steps: Sequence[Step]) -> dict[str, Tensor]:
    """All that decides the steps to come but the pace, which each rank keeps."""
    made = torch.tensor([astuple(step) for step in steps], dtype=torch.float64)
    state = {"steps": made, "gain": torch.tensor(trainer.gain, dtype=torch.float64)}
    for column in trainer.columns:
        state |= {f"{column.name}.{name}": tensor for name, tensor in column.state().items()}
        if trainer.gain:
            state |= dict(zip(_start_of(column), trainer.start[column.name], strict=True))
    return state


def _start_of(column: Columns) -> tuple[str, str]:
    """What the state calls the rows that the column's steps began with, and their values."""
    return f"{column.name}.start_rows", f"{column.name}.start"


def _resumed(columns: Sequence[Columns], trainer: Trainer, state: Mapping[str, Tensor] | None) -> list[Step]:
    """The steps that an earlier run made; the columns are as they were after them."""
    if state is None:
        return []
    trainer.gain = float(state["gain"])
    if trainer.gain:
        for column in columns:
            rows, values = (state[name] for name in _start_of(column))
            for row, value in zip(rows.tolist(), values, strict=True):
                column.put(row, value)
        trainer.hold()
    trainer.resume(len(state["steps"]))
    for column in columns:
        mine = f"{column.name}."
        column.set_state({name.removeprefix(mine): t for name, t in state.items() if name.startswith(mine)})
    return [Step(int(number), *losses) for number, *losses in state["steps"].tolist()]
