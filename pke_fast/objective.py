"""The losses: cross-entropy of answers, and KL to a model as it was, from hidden states without whole logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.batches import Batch
from pke_fast.placement import brought
from pke_fast.structure import Structure


class _EditLoss(torch.autograd.Function):
    """The weighted sum of edit_loss over positions; its gradient is made in the forward pass, where the logits are."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, structure: Structure, sides: dict[str, Tensor]) -> Tensor:
        losses, grad = position_losses(hidden.detach(), weights, structure, **sides)
        ctx.save_for_backward(grad)
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None


def position_losses(
    hidden: Tensor,
    weights: Tensor,
    structure: Structure,
    *,
    targets: Tensor | None = None,
    base_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses fp32 [N] at the supervised positions, and the gradient of their weighted sum: the op `edit_loss`."""
    with brought(structure.head):
        losses, grad = torch.ops.pke_fast.edit_loss(
            hidden,
            structure.head.weight,
            getattr(structure.head, "bias", None),
            targets,
            base_hidden,
            weights,
            structure.scale,
            structure.soft_cap,
        )
    return losses, grad


def answer_loss(structure: Structure, hidden: Tensor, batch: Batch, weights: Tensor) -> Tensor:
    """Weighted sum over the supervised positions of -log p(the answer's token); differentiable, on the head's device.

    Args:
        hidden: the head's input at the supervised positions [N, d].
        weights: fp32 [N], as of `Batch.answer_weights`.
    """
    at = structure.head_device
    return _EditLoss.apply(hidden.to(at), weights.to(at), structure, {"targets": batch.targets.to(at)})


def locality_loss(structure: Structure, hidden: Tensor, base_hidden: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the supervised positions of KL(p_base || p); differentiable, on the head's device.

    Args:
        hidden, base_hidden: the head's input at the supervised positions [N, d], now and as it is to stay.
        weights: fp32 [N], as of `Batch.answer_weights`.
    """
    at = structure.head_device
    return _EditLoss.apply(hidden.to(at), weights.to(at), structure, {"base_hidden": base_hidden.to(at)})
