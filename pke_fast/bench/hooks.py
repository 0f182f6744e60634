"""Trace and score by plain hooks: activations and gradients of every layer are kept until the backward pass is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import Batch, pack
from pke_fast.encoding import Encoded
from pke_fast.module_calls import hooks
from pke_fast.structure import Structure

ScoreMaps = tuple[Tensor, Tensor]
"""Weight change and activation path, fp32 [L, D] on the CPU, means over the requests."""


def trace_by_hooks(
    structure: Structure,
    sequences: Sequence[Encoded],
    *,
    pad_id: int,
    micro_batch_tokens: int,
    few_logits: bool = False,
) -> ScoreMaps:
    """The score maps of `pke_fast.trace`, by a forward hook on every down projection and retained gradients.

    Args:
        few_logits: make logits at the supervised positions alone, which plain code does not do by itself.

    Returns:
        weight change and activation path, fp32 [L, D] on the CPU.
    """
    sums = new_sums(structure)
    for batch in on_device(structure, sequences, pad_id, micro_batch_tokens):
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(_module: Any, args: Any, out: Tensor, kept: list[tuple[Tensor, Tensor]] = kept) -> None:
            args[0].retain_grad()
            out.retain_grad()
            kept.append((args[0], out))

        with hooks(*(mlp.down.register_forward_hook(keep) for mlp in structure.mlps)), torch.enable_grad():
            inputs = differentiable_inputs(structure, batch)
            if few_logits:
                hidden = structure.base(**inputs).last_hidden_state.flatten(0, 1)[batch.positions]
                loss = answers_loss(structure.head(hidden), batch)
            else:
                loss = answers_loss(structure.model(**inputs).logits.flatten(0, 1)[batch.positions], batch)
            loss.backward()
        for layer, (h, out) in enumerate(kept):
            assert h.grad is not None
            assert out.grad is not None
            add_scores(sums[:, layer], h.detach(), h.grad, out.grad)
    return as_maps(sums, sequences)


def on_device(structure: Structure, sequences: Sequence[Encoded], pad_id: int, tokens: int) -> list[Batch]:
    """The sequences as micro-batches on the model's device."""
    return [batch.to(structure.device) for batch in pack(sequences, tokens, pad_id)]


def differentiable_inputs(structure: Structure, batch: Batch) -> dict[str, Any]:
    """A call of the model in which every layer's tensors have gradients though all weights are frozen."""
    embedded = structure.model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    return {"inputs_embeds": embedded, "attention_mask": batch.attention_mask, "use_cache": False}


def answers_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over the batch's rows of the mean negative log-likelihood of each answer, from logits [N, V]."""
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * batch.answer_weights()).sum()


def new_sums(structure: Structure) -> Tensor:
    """Zeros [2, L, D]: sums of weight changes and of activation paths."""
    return torch.zeros(2, len(structure.layers), structure.neurons, device=structure.device)


@torch.no_grad()
def add_scores(sums: Tensor, h: Tensor, grad_h: Tensor, grad_out: Tensor) -> None:
    """Adds one layer's scores to sums [2, D].

    Args:
        h, grad_h: what enters the down projection and its gradient, [B, T, D]; a row is a request.
        grad_out: the gradient of the down projection's output, [B, T, d].
    """
    for request in range(len(h)):
        sums[0] += torch.linalg.vector_norm(grad_out[request].T @ h[request], dim=0, dtype=torch.float32)
    sums[1] += (h * grad_h).abs().sum((0, 1), dtype=torch.float32)


def as_maps(sums: Tensor, sequences: Sequence[Encoded]) -> ScoreMaps:
    """Means over the requests from sums [2, L, D]."""
    change, path = (sums / len(sequences)).cpu()
    return change, path
