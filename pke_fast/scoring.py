"""Scores of every neuron: weight change, activation path, activation; layer by layer over the tape, O(L * D) kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.batches import Batch, pack
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.kernels.glu_score import segment_sum
from pke_fast.objective import answer_loss
from pke_fast.structure import MLP, Structure, hooks, replaced_forward
from pke_fast.tape import record

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
    micro_batch_tokens: int,
    first: int = 0,
    advance: Callable[[int], None] = lambda _n: None,
) -> Scores:
    """Scores the neurons of the layers from `first` on by the gradient of each example's loss.

    Memory: what enters each layer for one micro-batch, one layer's activations, and three [L, D] sums.

    Raises:
        InputError: a score is not finite.
    """
    depth, device = len(structure.layers), structure.device
    sums = torch.zeros(3, depth, structure.neurons, device=device)
    sequences = [sequence for example in examples for sequence, _ in example]
    signs = torch.tensor([sign for example in examples for _, sign in example])
    groups = [index for index, example in enumerate(examples) for _ in example]
    for batch in pack(sequences, micro_batch_tokens, pad_id, groups):
        _score_batch(structure, batch, signs[list(batch.rows)], first, sums)
        advance(len(set(batch.groups)))
    if not torch.isfinite(sums).all():
        layer = int((~torch.isfinite(sums)).any(0).any(1).nonzero()[0, 0])
        raise InputError(
            f"the scores of layer {layer} are not finite", do="check the model, or load it in fp32 or bf16"
        )
    means = (sums / max(1, len(examples))).cpu()
    return Scores(means[0], means[1], means[2], len(examples), first)


def _score_batch(structure: Structure, batch: Batch, signs: Tensor, first: int, sums: Tensor) -> None:
    """Adds one micro-batch's weight changes to sums[0], paths to sums[1] and activations to sums[2]."""
    tape = record(structure, batch, first)
    assert tape.top is not None
    offsets = batch.group_offsets().to(structure.device)
    counted = tape.batch.attention_mask.flatten().bool()
    top = tape.top.detach().requires_grad_()
    weights = tape.batch.answer_weights(sign=signs.to(structure.device))
    with torch.enable_grad():
        loss = answer_loss(structure, tape.supervised(top), tape.batch, weights)
    (grad,) = torch.autograd.grad(loss, top)
    for layer in range(len(structure.layers) - 1, first - 1, -1):
        entered = tape.hidden.pop().detach().requires_grad_()  # not needed again
        with _scored(structure.mlps[layer], offsets, counted, sums[:, layer]), torch.enable_grad():
            left = tape.replay(layer, entered)
            (grad,) = torch.autograd.grad(left, entered, grad)


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
    for layer, (a, b) in enumerate(zip(before.mlps, after.mlps, strict=True)):
        old, new = before.down_weight(layer), after.down_weight(layer)
        change = (new if a.axis == b.axis else new.T).float().cpu() - old.float().cpu()
        rows.append(change.norm(dim=1 - a.axis))
    return torch.stack(rows)


class _GluScore(torch.autograd.Function):
    """act(gate) * up through the fused op: its forward adds each neuron's mean activation to `activation` [D], its
    backward each neuron's activation path to `path` [D]."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        mlp: MLP,
        offsets: Tensor,
        counted: Tensor,
        path: Tensor,
        activation: Tensor,
    ) -> Tensor:
        flat = [None if x is None else x.flatten(0, -2) for x in (gate, up)]
        ctx.save_for_backward(*flat, offsets, counted)
        ctx.act, ctx.fused, ctx.into, ctx.shape = mlp.act, mlp.fused, path, gate.shape
        h, mean, _ = torch.ops.pke_fast.glu_score_fwd(*flat, mlp.act, offsets, counted, mlp.fused)
        activation.add_(mean.sum(0))
        return h.unflatten(0, gate.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up, offsets, counted = ctx.saved_tensors
        dh = grads[0].flatten(0, -2)
        dgate, dup, path = torch.ops.pke_fast.glu_score_bwd(dh, gate, up, ctx.act, offsets, counted, ctx.fused)
        ctx.into.add_(path.sum(0))
        return dgate.view(ctx.shape), None if up is None else dup.view(ctx.shape), *[None] * 5


class _PathTap(torch.autograd.Function):
    """The identity on h, with the same two sums as `_GluScore`, for an activation that has no form in the op."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, offsets: Tensor, counted: Tensor, path: Tensor, activation: Tensor) -> Tensor:
        ctx.save_for_backward(h, offsets)
        ctx.into = path
        size = h.abs().float().flatten(0, -2).masked_fill_(~counted[:, None], 0)
        tokens = segment_sum(counted[:, None].float(), offsets).clamp_(min=1)
        activation.add_((segment_sum(size, offsets) / tokens).sum(0))
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, offsets = ctx.saved_tensors
        path = (h.float() * grads[0].float()).abs_().flatten(0, -2)
        ctx.into.add_(segment_sum(path, offsets).sum(0))
        return grads[0], None, None, None, None


class _ColumnTap(torch.autograd.Function):
    """The identity on the down projection's output, whose backward adds each column's gradient norm to `into` [D]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, offsets: Tensor, into: Tensor) -> Tensor:
        ctx.save_for_backward(h, offsets)
        ctx.into = into
        return out.clone()  # no view: Falcon adds to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, offsets = ctx.saved_tensors
        norms = torch.ops.pke_fast.column_grad_norm(grads[0].flatten(0, -2), h.flatten(0, -2), offsets)
        ctx.into.add_(norms.sum(0))
        return grads[0], None, None, None


@contextmanager
def _scored(mlp: MLP, offsets: Tensor, counted: Tensor, into: Tensor) -> Iterator[None]:
    """While it lasts, a pass through the MLP and back adds to its weight changes, paths and activations, into [3, D].

    Args:
        offsets: int64 [R + 1], where each request's tokens begin in the flattened [B * T].
        counted: bool [B * T], False for padding.
    """

    def tap_output(_module: Any, args: Any, out: Tensor) -> Tensor:
        return _ColumnTap.apply(out, args[0].detach(), offsets, into[0])

    def tap_input(_module: Any, args: Any) -> Any:
        return (_PathTap.apply(args[0], offsets, counted, into[1], into[2]),)

    handles = [mlp.down.register_forward_hook(tap_output)]
    if mlp.act is None:
        handles.append(mlp.down.register_forward_pre_hook(tap_input))
        with hooks(*handles):
            yield
        return

    def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        gate, up = mlp.projections(x)
        return mlp.down(_GluScore.apply(gate, up, mlp, offsets, counted, into[1], into[2]))

    with hooks(*handles), replaced_forward(mlp.module, forward):
        yield
