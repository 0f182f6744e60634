"""The Triton forms of sparse_column_grad, sparse_column_update, sparse_column_step and write_columns.

A neuron number outside the weight can't raise here, for that would wait for the GPU: nothing is written for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pke_fast.kernels.checks import with_dense_rows
from pke_fast.kernels.sparse_columns import check_grad, check_update, check_weight
from pke_fast.kernels.sparse_columns_triton_kernels import (
    sparse_column_grad_fwd_kernel,
    sparse_column_step_fwd_kernel,
    sparse_column_sum_fwd_kernel,
    sparse_column_update_fwd_kernel,
    write_columns_fwd_kernel,
)

PROGRAMS = 256  # wanted in a product: two for each of some 130 SMs. No card is asked, or bits would depend on it
LEAST_TOKENS = 256  # of a split: below, its fp32 partials move more bytes than the part of grad_out that it reads
MOST_SPLITS = 16
# A thread's own limit, said aloud: unasked, ptxas spills a register or two where one more block then fits a card's SM.
MOST_REGISTERS = 255


class Tile(NamedTuple):
    """How a product is cut: BN neurons by BD elements a program, BT tokens at a time."""

    BT: int
    BN: int
    BD: int
    warps: int
    stages: int


def tile_for(n: int, dtype: torch.dtype, fused: bool) -> Tile:
    """The tile for n neurons; `fused`: Adam follows, whose state wants registers too."""
    BN = min(max(16, triton.next_power_of_2(n)), 64)
    if dtype == torch.float32:  # by FMA, whose operands lie in registers
        return Tile(16, min(BN, 32), 64, 4, 3)
    if n <= 32 or (n <= 64 and not fused):
        return Tile(64, BN, 64, 4, 4)
    if fused:  # 64 x 128, or 4 warps, spills
        return Tile(64, 64, 64, 8, 4)
    return Tile(64, 64, 128, 8, 4)


def splits_for(tokens: int, programs: int) -> int:
    """Over how many programs the tokens of one tile are spread: a power of two."""
    splits = 1
    while splits < MOST_SPLITS and programs * splits < PROGRAMS and tokens >= 2 * splits * LEAST_TOKENS:
        splits *= 2
    return splits


def _programs(n: int, d: int, tile: Tile) -> int:
    return triton.cdiv(n, tile.BN) * triton.cdiv(d, tile.BD)


def _block(d: int) -> int:
    return min(512, triton.next_power_of_2(d))


def _operands(grad_out: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Both with dense rows; those of h padded to 16 elements, which is few, for loads of 16 bytes each."""
    n = h.shape[1]
    if n % 16 or h.stride(0) % 16 or h.stride(1) != 1:
        h = torch.nn.functional.pad(h, (0, -n % 16)).contiguous()
    return with_dense_rows(grad_out), h


def _multiply(grad_out: Tensor, h: Tensor, into: Tensor, tile: Tile, splits: int) -> None:
    """Adds h^T G to into [n, d], or writes the splits' parts into [splits, n, d]."""
    tokens, (n, d) = len(grad_out), into.shape[-2:]
    per_split = triton.cdiv(triton.cdiv(tokens, splits), tile.BT) * tile.BT
    sparse_column_grad_fwd_kernel[(_programs(n, d, tile), splits)](
        grad_out, h, into, tokens, n, h.shape[1], d,
        grad_out.stride(0), h.stride(0), into.stride(-2), into.stride(0), per_split,
        ADD=splits == 1, BT=tile.BT, BN=tile.BN, BD=tile.BD,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def grad(grad_out: Tensor, h: Tensor, into: Tensor) -> None:
    """As `reference_grad`; rows of `into` have to be dense.

    Raises:
        InputError: an argument is not as described.
    """
    check_grad(grad_out, h, into)
    n, d = into.shape
    if into.numel() == 0 or len(grad_out) == 0:
        return
    grad_out, h = _operands(grad_out, h)
    tile = tile_for(n, grad_out.dtype, fused=False)
    splits = splits_for(len(grad_out), _programs(n, d, tile))
    if splits == 1:
        _multiply(grad_out, h, into, tile, splits)
        return
    partials = torch.empty(splits, n, d, dtype=torch.float32, device=into.device)
    _multiply(grad_out, h, partials, tile, splits)
    BD = _block(d)
    sparse_column_sum_fwd_kernel[(n, triton.cdiv(d, BD))](
        partials, into, d, into.stride(0), partials.stride(0), SPLITS=splits, BD=BD, num_warps=4, num_stages=1
    )


def _adam(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bound: float
) -> dict[str, Any]:
    """Adam's constants as the kernels take them, each rounded once, to fp32."""
    return {
        "share1": 1 - beta1,
        "beta2": beta2,
        "share2": 1 - beta2,
        "unbias2": 1 / (1 - beta2**step),
        "eps": eps,
        "rate": lr / (1 - beta1**step),
        "pull": lr * weight_decay,
        "bound": bound,
        "DECAYED": weight_decay != 0,
        "BOUNDED": bound != float("inf"),
    }


def _launch_update(
    weight: Tensor, axis: int, neurons: Tensor, state: tuple[Tensor, ...], grads: Tensor, adam: dict[str, Any]
) -> None:
    """grads: [splits, n, d], contiguous."""
    splits, n, d = grads.shape
    BD = _block(d)
    sparse_column_update_fwd_kernel[(n, triton.cdiv(d, BD))](
        weight, neurons.contiguous(), *state, grads, d, weight.shape[axis],
        weight.stride(1 - axis), weight.stride(axis), grads.stride(0), **adam,
        SPLITS=splits, BD=BD, num_warps=4, num_stages=1,
    )  # fmt: skip


def update(
    weight: Tensor, axis: int, neurons: Tensor, old: Tensor, master: Tensor, moment1: Tensor, moment2: Tensor,
    grad: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bound: float,
) -> None:  # fmt: skip
    """As `reference_update`, in one pass over the state, which has to be contiguous.

    Raises:
        InputError: an argument is not as described.
    """
    grad, old = grad.contiguous(), old.contiguous()
    state = {"old": old, "master": master, "moment1": moment1, "moment2": moment2}
    check_update(weight, axis, neurons, step, **state, grad=grad)
    if grad.numel() == 0:
        return
    adam = _adam(step, lr, beta1, beta2, eps, weight_decay, bound)
    _launch_update(weight, axis, neurons, tuple(state.values()), grad[None], adam)


def step(
    weight: Tensor, axis: int, neurons: Tensor, old: Tensor, master: Tensor, moment1: Tensor, moment2: Tensor,
    grad_out: Tensor, h: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    bound: float,
) -> None:  # fmt: skip
    """As `reference_step`: in one kernel where the tiles fill a card, else the splits' products and one update.

    Raises:
        InputError: an argument is not as described.
    """
    op = "sparse_column_step"
    old = old.contiguous()
    state = {"old": old, "master": master, "moment1": moment1, "moment2": moment2}
    check_update(weight, axis, neurons, step, op=op, **state)
    check_grad(grad_out, h, master, op=op)
    if master.numel() == 0:
        return
    n, d = master.shape
    grad_out, h = _operands(grad_out, h)
    adam = _adam(step, lr, beta1, beta2, eps, weight_decay, bound)
    tile = tile_for(n, grad_out.dtype, fused=True)
    programs = _programs(n, d, tile)
    splits = splits_for(len(grad_out), programs)
    if splits > 1:
        partials = torch.empty(splits, n, d, dtype=torch.float32, device=weight.device)
        _multiply(grad_out, h, partials, tile, splits)
        _launch_update(weight, axis, neurons, tuple(state.values()), partials, adam)
        return
    sparse_column_step_fwd_kernel[(programs,)](
        weight, neurons.contiguous(), *state.values(), grad_out, h, len(grad_out), n, h.shape[1], d,
        weight.shape[axis], weight.stride(1 - axis), weight.stride(axis), grad_out.stride(0), h.stride(0), **adam,
        BT=tile.BT, BN=tile.BN, BD=tile.BD,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def write(weight: Tensor, axis: int, neurons: Tensor, values: Tensor) -> None:
    """As `reference_write`.

    Raises:
        InputError: an argument is not as described.
    """
    check_weight("write_columns", weight, axis, neurons, values, "values")
    if values.numel() == 0:
        return
    n, d = values.shape
    BD = _block(d)
    write_columns_fwd_kernel[(n, triton.cdiv(d, BD))](
        weight, neurons.contiguous(), values, d, weight.shape[axis], weight.stride(1 - axis), weight.stride(axis),
        *values.stride(), BD=BD, num_warps=4, num_stages=1,
    )  # fmt: skip
