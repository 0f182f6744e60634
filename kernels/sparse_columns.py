"""sparse_column_grad and sparse_column_update: gradient and Adam on the selected columns of a down projection alone."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_grad(grad_out: Tensor, h: Tensor, into: Tensor) -> None:
    """Adds the selected columns' gradient, h^T G, to `into`.

    Args:
        grad_out: G = dL/d(down projection's output) [T, d].
        h: the selected neurons' activations [T, n].
        into: fp32 [n, d], accumulated in place.
    """
    into.addmm_(h.float().T, grad_out.float())


def reference_update(
    weight: Tensor,
    axis: int,
    neurons: Tensor,
    old: Tensor,
    master: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    grad: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bound: float,
) -> None:
    """One step of Adam on the selected columns, written into the live weight in place and nowhere else.

    Adam (Kingma & Ba 2015) with bias correction; the decay is decoupled (Loshchilov & Hutter 2019) and pulls towards
    the old values, so that it bounds the change, not the weight.

    Args:
        weight: the live weight, [d, D] with neurons as columns (axis 1) or [D, d] with neurons as rows (axis 0).
        neurons: int64 [n], ascending.
        old: the columns' values before the edit, fp32 [n, d].
        master, moment1, moment2: fp32 [n, d], changed in place.
        grad: fp32 [n, d].
        step: 1 for the first.
        bound: most that an element may differ from `old`; infinity for no bound.
    """
    moment1.lerp_(grad, 1 - beta1)
    moment2.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (moment2 / (1 - beta2**step)).sqrt_().add_(eps)
    if weight_decay:
        master.sub_((master - old).mul_(lr * weight_decay))
    master.addcdiv_(moment1, denominator, value=-lr / (1 - beta1**step))
    if bound != float("inf"):
        torch.clamp(master, old - bound, old + bound, out=master)
    write_columns(weight, axis, neurons, master)


def write_columns(weight: Tensor, axis: int, neurons: Tensor, values: Tensor) -> None:
    """Replaces the neurons' columns (axis 1) or rows (axis 0) of `weight` by `values` [n, d], rounded to its dtype."""
    values = values.to(weight.dtype)
    weight.index_copy_(axis, neurons, values.T if axis == 1 else values)


def read_columns(weight: Tensor, axis: int, neurons: Tensor) -> Tensor:
    """The neurons' columns (axis 1) or rows (axis 0) of `weight` as a new tensor [n, d] in its dtype."""
    picked = weight.index_select(axis, neurons)
    return picked.T.contiguous() if axis == 1 else picked
