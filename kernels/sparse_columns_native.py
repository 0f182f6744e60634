"""The C++ forms of the ops on selected columns: csrc/sparse_columns.cpp and csrc/sparse_column_grad.cpp.

Their results don't depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pke_fast.kernels.checks import require, with_dense_rows
from pke_fast.kernels.sparse_columns import check_grad, check_update, check_weight, reference_grad
from pke_fast.native import dtype_of, library

_STEP_NEURONS = 256  # whose gradient `step` keeps at a time


def grad(grad_out: Tensor, h: Tensor, into: Tensor) -> None:
    """As `reference_grad`; the rows of `into` have to be dense.

    Raises:
        InputError: an argument is not as described, `into` shares memory with another, or not on the CPU.
        PKEError: the compiled part is missing.
    """
    check_grad(grad_out, h, into)
    _check_memory("sparse_column_grad", {"into": into}, {"grad_out": grad_out, "h": h})
    _grad(grad_out, h, into)


def _grad(grad_out: Tensor, h: Tensor, into: Tensor) -> None:
    if h.shape[1] == 1 and h.dtype == torch.float32:
        # A matrix times a vector: torch's took 0.6 to 0.8 of our time (T = 512, d = 576; T = 1024, d = 4096).
        reference_grad(grad_out.detach(), h.detach(), into.detach())
        return
    grad_out, h = with_dense_rows(grad_out), with_dense_rows(h)
    library().sparse_column_grad(
        grad_out=grad_out.data_ptr(),
        grad_out_stride=grad_out.stride(0),
        h=h.data_ptr(),
        h_stride=h.stride(0),
        dtype=dtype_of(h),
        tokens=len(h),
        hidden=grad_out.shape[1],
        n=h.shape[1],
        into=into.data_ptr(),
        into_stride=into.stride(0),
        threads=torch.get_num_threads(),
    )


def update(
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
    """As `reference_update`; the state has to be contiguous, the weight may have any strides.

    Raises:
        InputError: an argument is not as described, a neuron is out of range or there twice, what is changed shares
            memory with another tensor, or one is not on the CPU. Nothing is changed then.
        PKEError: the compiled part is missing.
    """
    op = "sparse_column_update"
    state = (old, master, moment1, moment2)
    check_update(weight, axis, neurons, step, op, **dict(zip(_STATE, state, strict=True)), grad=grad)
    rates = (step, lr, beta1, beta2, eps, weight_decay, bound)
    _check_rates(op, *rates)
    changed = {"weight": weight, **dict(zip(_STATE[1:], state[1:], strict=True))}
    _check_memory(op, changed, {"old": old, "grad": grad})
    neurons = _checked_neurons(op, weight, axis, neurons)
    _update(weight, axis, neurons, state, grad, rates)


def step(
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
    """As `reference_step`, with the gradient of at most 256 neurons at a time.

    Raises:
        InputError: as `update` and `grad`. Nothing is changed then.
        PKEError: the compiled part is missing.
    """
    op = "sparse_column_step"
    state = (old, master, moment1, moment2)
    check_update(weight, axis, neurons, step, op, **dict(zip(_STATE, state, strict=True)))
    check_grad(grad_out, h, master, op)
    rates = (step, lr, beta1, beta2, eps, weight_decay, bound)
    _check_rates(op, *rates)
    changed = {"weight": weight, **dict(zip(_STATE[1:], state[1:], strict=True))}
    _check_memory(op, changed, {"old": old, "grad_out": grad_out, "h": h})
    neurons = _checked_neurons(op, weight, axis, neurons)
    for first in range(0, len(neurons), _STEP_NEURONS):
        block = slice(first, first + _STEP_NEURONS)
        grad = torch.zeros_like(master[block])
        _grad(grad_out, h[:, block], grad)
        _update(weight, axis, neurons[block], tuple(tensor[block] for tensor in state), grad, rates)


def write(weight: Tensor, axis: int, neurons: Tensor, values: Tensor) -> None:
    """As `reference_write`; values of the weight's dtype keep every bit.

    Raises:
        InputError: an argument is not as described, a neuron is out of range or there twice, the weight shares memory
            with the values, or one is not on the CPU. Nothing is changed then.
        PKEError: the compiled part is missing.
    """
    op = "write_columns"
    check_weight(op, weight, axis, neurons, values, "values")
    _check_memory(op, {"weight": weight}, {"values": values})
    neurons = _checked_neurons(op, weight, axis, neurons)
    if values.dtype not in (torch.float32, weight.dtype):
        values = values.to(weight.dtype)
    values = with_dense_rows(values)
    library().write_columns(
        columns=_columns(weight, axis, neurons),
        values=values.data_ptr(),
        value_stride=values.stride(0),
        values_are_fp32=values.dtype == torch.float32,
        threads=torch.get_num_threads(),
    )


_STATE = ("old", "master", "moment1", "moment2")


def _update(
    weight: Tensor, axis: int, neurons: Tensor, state: tuple[Tensor, ...], grad: Tensor, rates: tuple[float, ...]
) -> None:
    addresses = [tensor.data_ptr() for tensor in (*state, grad)]
    library().sparse_column_update(_columns(weight, axis, neurons), *addresses, *rates, torch.get_num_threads())


def _columns(weight: Tensor, axis: int, neurons: Tensor) -> Any:
    """The C++ side's view of the neurons of a weight; the caller holds both tensors."""
    return library().Columns(
        weight=weight.data_ptr(),
        dtype=dtype_of(weight),
        hidden=weight.shape[1 - axis],
        neuron_stride=weight.stride(axis),
        hidden_stride=weight.stride(1 - axis),
        neurons=neurons.data_ptr(),
        n=len(neurons),
    )


def _checked_neurons(op: str, weight: Tensor, axis: int, neurons: Tensor) -> Tensor:
    """The neurons, contiguous. Raises InputError unless each is one of the weight's and there once."""
    neurons, count = neurons.contiguous(), weight.shape[axis]
    fault = library().check_neurons(neurons.data_ptr(), len(neurons), count)
    require(fault is None, op, "neurons", f"within 0 to {count - 1}, each once", fault)
    return neurons


def _check_rates(
    op: str, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bound: float
) -> None:
    require(step >= 1, op, "step", "1 for the first, then more", step)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        require(math.isfinite(value) and value >= 0, op, name, "a number, at least 0", value)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        require(0 <= value < 1, op, name, "at least 0, less than 1", value)
    require(bound >= 0, op, "bound", "at least 0, infinity for none", bound)


def _check_memory(op: str, changed: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises InputError unless all are on the CPU and nothing that is changed shares memory with anything else."""
    for name, tensor in changed.items():
        if tensor.device.type != "cpu":
            require(False, op, name, "a CPU tensor for the C++ form", tensor.device)
        if not tensor.is_contiguous():
            sides = sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
            own = len(sides) < 2 or sides[1][0] > sides[0][0] * (sides[0][1] - 1)
            require(own and all(sides[0]), op, name, "each element in a place of its own", f"strides {tensor.stride()}")
    reached, last = 0, ""
    for begin, end, name in sorted((*_span(tensor), name) for name, tensor in (changed | read).items()):
        if begin < min(reached, end) and (name in changed or last in changed):
            require(False, op, name, f"memory of its own, not {last}'s", f"addresses {begin:#x} to {end:#x}")
        if end > reached:
            reached, last = end, name


def _span(tensor: Tensor) -> tuple[int, int]:
    """A tensor's first address and the one behind its last."""
    begin, elements = tensor.data_ptr(), tensor.numel()
    if elements and not tensor.is_contiguous():
        elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + elements * tensor.element_size()
