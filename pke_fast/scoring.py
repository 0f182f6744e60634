"""Scores of every neuron: weight change, activation path, activation; layer by layer over the tape, O(L * D) kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.batches import Batch, make_batch, packing
from pke_fast.beginning import beginning_of
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.kernels.glu_score import segment_sum
from pke_fast.memory import is_out_of_memory
from pke_fast.module_calls import hooks, replaced_forward
from pke_fast.objective import answer_loss
from pke_fast.pace import Pace, in_flight
from pke_fast.placement import brought_at_every_call, stored_weight
from pke_fast.ranks import ALONE, Ranks
from pke_fast.resume import NOWHERE, Snapshot
from pke_fast.structure import MLP, Structure
from pke_fast.tape import Tape, record, record_whole

LEAST_SEQUENCES = 32  # for which what all begin with is run by itself in the layers below

Example = Sequence[tuple[Encoded, float]]
"""One request's loss: a sum of sign * (mean answer loss) over its sequences."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Means over requests; adding two of them gives the scores of both sets of requests together.

    Attributes:
        weight_change: fp32 [L, D] on the CPU: mean over requests of ||dL_r/dW_down[:, i]||_2.
        activation_path: fp32 [L, D]: mean over requests of sum_t |h_ti * dL_r/dh_ti|.
        activation: fp32 [L, D]: mean over requests of the mean over tokens of |h_ti|.
        requests: how many requests.
        first: layers below were not scored; their rows are 0.
    """

    weight_change: Tensor
    activation_path: Tensor
    activation: Tensor
    requests: int
    first: int = 0

    @property
    def layer_path(self) -> Tensor:
        """The path score of each layer, fp32 [L]: the sum of its neurons'."""
        return self.activation_path.sum(1)

    def __add__(self, other: Scores) -> Scores:
        total = self.requests + other.requests
        if total == 0:
            return self
        a, b = self.requests / total, other.requests / total
        return Scores(
            a * self.weight_change + b * other.weight_change,
            a * self.activation_path + b * other.activation_path,
            a * self.activation + b * other.activation,
            total,
            max(self.first, other.first),
        )


def score(
    structure: Structure,
    examples: Sequence[Example],
    *,
    pad_id: int,
    pace: Pace,
    first: int = 0,
    ranks: Ranks = ALONE,
    snapshot: Snapshot = NOWHERE,
    advance: Callable[[int], None] = lambda _n: None,
) -> Scores:
    """Scores the neurons of the layers from `first` on by the gradient of each example's loss.

    Memory: two times three [L, D] sums, and one micro-batch: the graph of the layers that keep theirs, what enters each
    of the others, and one layer's graph.

    Args:
        ranks: each scores its share of the examples; the sums are added up once, at the end.
        snapshot: keeps the sums so far, and goes on from them.

    Raises:
        InputError: a score is not finite, or there is too little memory for the least micro-batch.
    """
    sequences = [sequence for example in examples for sequence, _ in example]
    signs = torch.tensor([sign for example in examples for _, sign in example])
    groups = [index for index, example in enumerate(examples) for _ in example]
    sums = torch.zeros(3, len(structure.layers), structure.neurons, device=structure.device)
    mine = set(ranks.mine(range(len(examples))))

    def packed(left: Sequence[int]) -> list[list[int]]:
        part = packing([sequences[i] for i in left], pace.tokens, [groups[i] for i in left])
        return [[left[i] for i in rows] for rows in part]

    waiting = packed([i for i, group in enumerate(groups) if group in mine])
    if kept := snapshot.load():
        sums.copy_(kept["sums"])
        pace.resume(int(kept["tokens"]))
        waiting = [rows.tolist() for rows in kept["waiting"].split(kept["counts"].tolist())]
        advance(len(mine) - len({groups[i] for rows in waiting for i in rows}))
    beginning = _beginning(structure, sequences, first, pad_id)
    rests = [] if beginning is None else [s.after(beginning.batch.input_ids.shape[1]) for s in sequences]
    while waiting:
        rows = waiting[0]
        try:
            batch = make_batch(sequences, rows, pad_id, groups)
            rest = make_batch(rests, rows, pad_id, groups) if rests else None
            with in_flight(batch):
                some = signs[list(batch.rows)]
                sums += score_batch(structure, batch, some, first, pace.scoring_kept, rest, beginning)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            waiting.pop(0)
            advance(len(set(batch.groups)))
            snapshot.save(partial(_state, sums, waiting, pace), done=not waiting)
            continue
        pace.halve("scoring")  # here, since the exception holds on to the memory
        waiting = packed([i for rows in waiting for i in rows])
        snapshot.save(partial(_state, sums, waiting, pace), done=True)  # goes on at this pace, whatever is free then
    ranks.add_up(sums)
    if not torch.isfinite(sums).all():
        layer = int((~torch.isfinite(sums)).any(0).any(1).nonzero()[0, 0])
        raise InputError(
            f"the scores of layer {layer} are not finite", do="check the model, or load it in fp32 or bf16"
        )
    means = (sums / max(1, len(examples))).cpu()
    return Scores(means[0], means[1], means[2], len(examples), first)


def _state(sums: Tensor, waiting: Sequence[Sequence[int]], pace: Pace) -> dict[str, Tensor]:
    return {
        "sums": sums,
        "tokens": torch.tensor(pace.tokens),
        "waiting": torch.tensor([i for rows in waiting for i in rows], dtype=torch.int64),
        "counts": torch.tensor([len(rows) for rows in waiting], dtype=torch.int64),
    }


def _beginning(structure: Structure, sequences: Sequence[Encoded], first: int, pad_id: int) -> Tape | None:
    """What all begin with, up to the layer `first`, where it is worth finding: it takes a few runs of those layers."""
    if len(sequences) < LEAST_SEQUENCES or any(brought_at_every_call(layer) for layer in structure.layers):
        return None
    return beginning_of(structure, sequences, first, pad_id)


def score_batch(
    structure: Structure,
    batch: Batch,
    signs: Tensor,
    first: int,
    kept: int | None = None,
    rest: Batch | None = None,
    beginning: Tape | None = None,
) -> Tensor:
    """One micro-batch's sums over its requests, fp32 [3, L, D]: weight changes, paths, activations.

    Args:
        signs: the sign of each row's loss, fp32 [B].
        kept: as of `Tape.there_and_back`.
        rest, beginning: as of `record_whole`; None where whole rows run in the layers below.
    """
    if rest is None or beginning is None:
        tape = record(structure, batch, first)
    else:
        tape = record_whole(structure, batch, rest, first, beginning)
    sums = torch.zeros(3, len(structure.layers), structure.neurons, device=structure.device)
    starts = batch.group_offsets()
    offsets, longest = torch.tensor(starts), max(b - a for a, b in pairwise(starts))
    counted = tape.batch.attention_mask.flatten().bool()
    weights = tape.batch.answer_weights(sign=signs.to(structure.device))
    shared: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
    elsewhere: list[tuple[int, Tensor]] = []  # sums of layers on another device
    with ExitStack() as stack:
        for layer in range(first, len(structure.layers)):
            at = structure.device_of(layer)
            if at not in shared:
                anchor = torch.zeros((), requires_grad=True, device=at)
                shared[at] = offsets.to(at), counted.to(at), anchor
            into = sums[:, layer]
            if at != into.device:
                into = torch.zeros(into.shape, device=at)
                elsewhere.append((layer, into))
            stack.enter_context(_scored(structure.mlps[layer], _Sums(*shared[at], into, longest)))
        tape.there_and_back(lambda hidden: answer_loss(structure, hidden, tape.batch, weights), kept)
    for layer, into in elsewhere:
        sums[:, layer] = into
    return sums


def drift(before: Structure, after: Structure) -> Tensor:
    """Weight change between two checkpoints: ||W'_down[:, i] - W_down[:, i]||_2, fp32 [L, D] on the CPU.

    Raises:
        InputError: the two models differ in shape.
    """
    shapes = [(len(s.layers), s.neurons, s.hidden_size) for s in (before, after)]
    if shapes[0] != shapes[1]:
        raise InputError(
            "the two models differ in shape",
            expected="layers {}, neurons a layer {}, hidden size {}".format(*shapes[0]),
            got="layers {}, neurons a layer {}, hidden size {}".format(*shapes[1]),
        )
    rows = []
    for a, b in zip(before.mlps, after.mlps, strict=True):
        old, new = (stored_weight(mlp.down, "weight") for mlp in (a, b))
        change = (new if a.axis == b.axis else new.T).float().cpu() - old.float().cpu()
        rows.append(change.norm(dim=1 - a.axis))
    return torch.stack(rows)


@dataclass(eq=False)
class _Sums:
    """Where one layer's scores of one micro-batch go.

    Attributes:
        offsets: int64 [R + 1], where each request's tokens begin in the flattened [B * T].
        counted: bool [B * T], False for padding.
        anchor: a scalar that needs a gradient: the lowest layer's h depends on nothing else that does.
        into: fp32 [3, D]: weight changes, paths, activations.
        longest: the most tokens of a request.
        grad_out: on the way back, the gradient at the down projection's output, until h's is there too.
    """

    offsets: Tensor
    counted: Tensor
    anchor: Tensor
    into: Tensor
    longest: int
    grad_out: Tensor | None = None

    def add_weight_change(self, h: Tensor) -> None:
        """Adds the column's gradient norms, from h [B * T, D] and the gradient that waits; it is let go."""
        assert self.grad_out is not None
        norms = torch.ops.pke_fast.column_grad_norm(self.grad_out.flatten(0, -2), h, self.offsets, self.longest)
        self.into[0].add_(norms.sum(0))
        self.grad_out = None


class _GluScore(torch.autograd.Function):
    """act(gate) * up through the fused op: its forward adds each neuron's mean activation, its backward the path and,
    with h made anew, the weight change. So gate and up are all that a layer keeps of its MLP."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, mlp: MLP, sums: _Sums, _anchor: Tensor) -> Tensor:
        flat = [None if x is None else x.flatten(0, -2) for x in (gate, up)]
        ctx.save_for_backward(*flat)
        ctx.act, ctx.fused, ctx.sums, ctx.shape = mlp.act, mlp.fused, sums, gate.shape
        h, mean, _ = torch.ops.pke_fast.glu_score_fwd(*flat, mlp.act, sums.offsets, sums.counted, mlp.fused)
        sums.into[2].add_(mean.sum(0))
        return h.unflatten(0, gate.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gate, up), sums = ctx.saved_tensors, ctx.sums
        ragged = (ctx.act, sums.offsets, sums.counted, ctx.fused)
        h, _, _ = torch.ops.pke_fast.glu_score_fwd(gate, up, *ragged)
        sums.add_weight_change(h)
        del h
        dgate, dup, path = torch.ops.pke_fast.glu_score_bwd(grads[0].flatten(0, -2), gate, up, *ragged)
        sums.into[1].add_(path.sum(0))
        return dgate.view(ctx.shape), None if up is None else dup.view(ctx.shape), None, None, None


class _PathTap(torch.autograd.Function):
    """The identity on h, with the same sums as `_GluScore`, for an activation that has no form in the op."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, sums: _Sums, _anchor: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        ctx.sums = sums
        size = h.abs().float().flatten(0, -2).masked_fill_(~sums.counted[:, None], 0)
        tokens = segment_sum(sums.counted[:, None].float(), sums.offsets).clamp_(min=1)
        sums.into[2].add_((segment_sum(size, sums.offsets) / tokens).sum(0))
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (h,), sums = ctx.saved_tensors, ctx.sums
        sums.add_weight_change(h.flatten(0, -2))
        path = (h.float() * grads[0].float()).abs_().flatten(0, -2)
        sums.into[1].add_(segment_sum(path, sums.offsets).sum(0))
        return grads[0], None, None


class _Outlet(torch.autograd.Function):
    """The identity on the down projection's output, whose backward keeps the gradient for the weight change."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, sums: _Sums) -> Tensor:
        ctx.sums = sums
        return out.clone()  # no view: Falcon adds to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.sums.grad_out = grads[0]
        return grads[0], None


@contextmanager
def _scored(mlp: MLP, sums: _Sums) -> Iterator[None]:
    """While it lasts, a pass through the MLP and back, with gradients enabled, adds to its sums."""

    def tap_output(_module: Any, _args: Any, out: Tensor) -> Tensor:
        return _Outlet.apply(out, sums) if torch.is_grad_enabled() else out

    def tap_input(_module: Any, args: Any) -> Any:
        return (_PathTap.apply(args[0], sums, sums.anchor),) if torch.is_grad_enabled() else args

    handles = [mlp.down.register_forward_hook(tap_output)]
    if mlp.act is None:
        handles.append(mlp.down.register_forward_pre_hook(tap_input))
        with hooks(*handles):
            yield
        return
    own = mlp.module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return own(x, *args, **kwargs)
        gate, up = mlp.projections(x)
        return mlp.down(_GluScore.apply(gate, up, mlp, sums, sums.anchor))

    with hooks(*handles), replaced_forward(mlp.module, forward):
        yield
