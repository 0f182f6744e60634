"""Gradient, Adam and in-place writes for selected neurons alone: columns of a down projection, rows of gate or up.

A neuron's column of the down projection has the gradient G^T h_i with G = dL/d(output) and h its activations; its row
of the gate projection has X^T g_i with X the projection's input and g = dL/d(gate). Both are sums over tokens of an
outer product, so the same ops serve both: [T, d] beside [T, n]. A weight holds neurons as columns, [d, D] (axis 1: a
Linear's down projection), or as rows, [D, d] (axis 0: a Conv1D's down projection; a Linear's gate or up projection).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pke_fast.kernels.checks import FLOATS, require, same_device


def reference_grad(grad_out: Tensor, h: Tensor, into: Tensor) -> None:
    """Adds the selected columns' gradient, h^T G, to `into`.

    Args:
        grad_out: G = dL/d(down projection's output) [T, d], bf16, fp16 or fp32.
        h: the selected neurons' activations [T, n], in the same dtype.
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
    reference_write(weight, axis, neurons, master)


def reference_step(
    weight: Tensor,
    axis: int,
    neurons: Tensor,
    old: Tensor,
    master: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    grad_out: Tensor,
    h: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bound: float,
) -> None:
    """`reference_grad` and `reference_update` in one, for an optimiser step of one micro-batch: no gradient is kept.

    Args:
        grad_out, h: as for `reference_grad`; the others as for `reference_update`.
    """
    grad = torch.zeros_like(master)
    reference_grad(grad_out, h, grad)
    state = (old, master, moment1, moment2)
    reference_update(weight, axis, neurons, *state, grad, step, lr, beta1, beta2, eps, weight_decay, bound)


def reference_write(weight: Tensor, axis: int, neurons: Tensor, values: Tensor) -> None:
    """Replaces the neurons' columns (axis 1) or rows (axis 0) of `weight` by `values`, rounded to its dtype.

    Args:
        weight: [d, D] (axis 1) or [D, d] (axis 0), changed in place and nowhere else.
        neurons: int64 [n], each once.
        values: [n, d], any float dtype.
    """
    values = values.to(weight.dtype)
    weight.index_copy_(axis, neurons, values.T if axis == 1 else values)


def read_columns(weight: Tensor, axis: int, neurons: Tensor) -> Tensor:
    """The neurons' columns (axis 1) or rows (axis 0) of `weight` as a new tensor [n, d] in its dtype."""
    picked = weight.index_select(axis, neurons)
    return picked.T.contiguous() if axis == 1 else picked


def check_grad(grad_out: Tensor, h: Tensor, into: Tensor, op: str = "sparse_column_grad") -> None:
    """Raises InputError unless the arguments are as `reference_grad` describes them, and rows of `into` are dense."""
    same_device(op, grad_out=grad_out, h=h, into=into)
    require(grad_out.dim() == 2, op, "grad_out", "[tokens, d]", list(grad_out.shape))
    require(grad_out.dtype in FLOATS, op, "grad_out", "fp32, bf16 or fp16", grad_out.dtype)
    require(h.dim() == 2 and len(h) == len(grad_out), op, "h", f"[{len(grad_out)} tokens, n]", list(h.shape))
    require(h.dtype == grad_out.dtype, op, "h", f"grad_out's dtype, {grad_out.dtype}", h.dtype)
    shape = (h.shape[1], grad_out.shape[1])
    require(into.shape == shape, op, "into", f"[n, d] = {list(shape)}", list(into.shape))
    require(into.dtype == torch.float32, op, "into", "fp32", into.dtype)
    # It is changed in place, so a dense copy would be lost.
    require(into.shape[1] <= 1 or into.stride(1) == 1, op, "into", "rows of neighbouring elements", into.stride())


def check_weight(op: str, weight: Tensor, axis: int, neurons: Tensor, values: Tensor, name: str) -> None:
    """Raises InputError unless neurons of `weight` can be replaced by `values`, [n, d] of any float dtype."""
    same_device(op, weight=weight, neurons=neurons, **{name: values})
    require(weight.dim() == 2, op, "weight", "two dimensions", list(weight.shape))
    require(weight.dtype in FLOATS, op, "weight", "fp32, bf16 or fp16", weight.dtype)
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True))
    require(not overlaps, op, "weight", "each element in a place of its own", f"strides {weight.stride()}")
    require(axis in (0, 1), op, "axis", "0 (neurons are rows) or 1 (columns)", axis)
    require(neurons.dim() == 1, op, "neurons", "[n]", list(neurons.shape))
    require(neurons.dtype == torch.int64, op, "neurons", "int64", neurons.dtype)
    shape = (len(neurons), weight.shape[1 - axis])
    require(values.shape == shape, op, name, f"[n, d] = {list(shape)}", list(values.shape))
    require(values.is_floating_point(), op, name, "a float dtype", values.dtype)


def check_update(
    weight: Tensor, axis: int, neurons: Tensor, step: int, op: str = "sparse_column_update", **state: Tensor
) -> None:
    """Raises InputError unless weight, neurons and every tensor of the state are as `reference_update` describes them.

    The state's tensors have to be contiguous: they are changed in place.
    """
    first, *_ = state
    check_weight(op, weight, axis, neurons, state[first], first)
    shape = state[first].shape
    for name, tensor in state.items():
        if tensor.shape != shape or tensor.device != weight.device:
            check_weight(op, weight, axis, neurons, tensor, name)
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            require(False, op, name, "fp32, contiguous", f"{tensor.dtype}, strides {tensor.stride()}")
    require(step >= 1, op, "step", "1 for the first, then more", step)
