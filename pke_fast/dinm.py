"""DINM (Wang et al. 2024, arXiv 2403.14472), the comparator: one layer's whole down projection, in two forms.

`dinm` is the method as it was meant: the layer is where safe and unsafe answers to the same prompts lie furthest apart,
and all requests are edited together under a KL term that pulls. `dinm-parity` computes what was published: the answers
are compared without their prompts, padding included; the first request's layer serves all; requests are edited one
after another; the KL term is measured but has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import pack
from pke_fast.columns import Columns, put_back_on_failure
from pke_fast.config import PKEConfig
from pke_fast.editing import Outcome
from pke_fast.encoding import Encoded
from pke_fast.pace import Pace, in_flight
from pke_fast.structure import Structure
from pke_fast.tape import record
from pke_fast.trainer import Losses, Step, Trainer

PARITY_STOP_LOSS = 1e-4  # the published loop ends below it


@torch.no_grad()
def answer_distances(
    structure: Structure,
    answers: Sequence[tuple[Encoded, Encoded]],
    *,
    pad_id: int,
    micro_batch_tokens: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> Tensor:
    """Mean over requests of the distance between the safe and the unsafe answer after every layer, fp32 [L].

    An answer is the mean of its tokens' hidden states, read with its prompt before it.
    """
    depth = len(structure.layers)
    sequences = [sequence for pair in answers for sequence in pair]
    groups = [index for index in range(len(answers)) for _ in range(2)]
    total = torch.zeros(depth, device=structure.device)
    for batch in pack(sequences, micro_batch_tokens, pad_id, groups):
        with in_flight(batch):
            tape = record(structure, batch)
            for layer, hidden in enumerate(tape.outputs()):
                here = tape.batch.to(hidden.device)
                weights = here.answer_weights()
                tokens = hidden.flatten(0, 1).index_select(0, here.positions + 1).float() * weights[:, None]
                means = tokens.new_zeros(len(batch.rows), tokens.shape[1]).index_add_(0, here.owners, tokens)
                total[layer] += (means[0::2] - means[1::2]).norm(dim=1).sum().to(total.device)
        advance(len(batch.rows) // 2)
    return (total / max(1, len(answers))).cpu()


@torch.no_grad()
def published_layer(structure: Structure, safe: Sequence[int], unsafe: Sequence[int], pad_id: int) -> int:
    """The layer that the published code finds for one request, from the tokens of its two answers alone.

    The distance is the Frobenius norm over all positions, padding included; the last hidden state is the normed one.
    """
    length = max(len(safe), len(unsafe))
    ids = torch.tensor([[*answer, *[pad_id] * (length - len(answer))] for answer in (safe, unsafe)])
    mask = torch.tensor([[1] * len(answer) + [0] * (length - len(answer)) for answer in (safe, unsafe)])
    device = structure.device
    out = structure.base(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, output_hidden_states=True
    )
    distances = [float(torch.dist(hidden[0].float(), hidden[1].float())) for hidden in out.hidden_states[1:]]
    return distances.index(max(distances))


def edit_one_by_one(
    structure: Structure,
    layer: int,
    requests: Sequence[Encoded],
    locality: Sequence[Encoded],
    config: PKEConfig,
    *,
    pad_id: int,
    stage: Callable[[str, int], Any],
    pace: Pace | None = None,
) -> Outcome:
    """The published edit: for each request in turn, fresh Adam on the whole layer, the locality KL without gradient.

    Args:
        locality: one pair a request, used in turn.
        pace: as for `Trainer`.

    Raises:
        EditError: a loss became NaN; the weights are then as they were.
    """
    columns = [Columns(structure, layer, torch.arange(structure.neurons))]
    pace, steps = pace or Pace.unplanned(config), list[Step]()
    with put_back_on_failure(columns), stage("Editing request by request", len(requests)) as advance:
        everything = Trainer(structure, columns, requests, locality[: len(requests)], config, pad_id, pace=pace)
        before = Losses(everything.edit_loss(), 0.0)
        for index, request in enumerate(requests):
            pair = [locality[index % len(locality)]] if locality else []
            columns[0].reset()
            trainer = Trainer(structure, columns, [request], pair, config, pad_id, pace=pace)
            for number in range(config.num_steps):
                step = trainer.step(number, kl_gradient=False)
                steps.append(replace(step, step=len(steps) + 1))
                if step.loss < PARITY_STOP_LOSS:
                    break
            advance(1)
        after = everything.final_losses()
        layers = tuple(column.patch() for column in columns)
        return Outcome(layers, tuple(steps), before, after, "every request was edited")
