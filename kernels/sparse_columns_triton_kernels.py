"""The Triton kernels behind sparse_columns_triton.py: products of tokens, Adam, and writes into the live weight."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pke_fast.kernels.triton_parts import dot, rounded, widened


@triton.jit
def _product(
    grad_out, h, stride_g, stride_h, first, end, width_h, d, offs_n, offs_d,
    BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The tile h^T G [BN, BD] over the tokens first .. end - 1."""
    b_acc = tl.zeros((BD, BN), tl.float32)  # [BD, BN]
    b_t = tl.arange(0, BT)
    p_h = h + (first + b_t).to(tl.int64)[:, None] * stride_h + offs_n[None, :]  # [BT, BN]
    p_g = grad_out + offs_d[:, None] + (first + b_t).to(tl.int64)[None, :] * stride_g  # [BD, BT]
    for t in range(first, end, BT):
        b_in = t + b_t < end
        b_h = tl.load(p_h, mask=b_in[:, None] & (offs_n < width_h)[None, :], other=0.0)  # [BT, BN]
        b_g = tl.load(p_g, mask=(offs_d < d)[:, None] & b_in[None, :], other=0.0)  # [BD, BT]
        b_acc = dot(b_g, b_h, b_acc)
        p_h += BT * stride_h
        p_g += BT * stride_g
    return tl.trans(b_acc)


@triton.jit(do_not_specialize=["tokens", "n", "per_split"])  # one compilation for all batches and layers
def sparse_column_grad_fwd_kernel(
    grad_out, h, into, tokens, n, width_h, d, stride_g, stride_h, stride_i, stride_split, per_split,
    ADD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """into [n, d] += h^T G; not ADD: one split of the tokens, written into its own [n, d] of `into`."""
    tiles_n = tl.cdiv(n, BN)  # they go first: they share what they read of grad_out
    offs_n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    offs_d = tl.program_id(0) // tiles_n * BD + tl.arange(0, BD)
    split = tl.program_id(1)
    first = split * per_split
    end = tl.minimum(first + per_split, tokens)
    b_acc = _product(grad_out, h, stride_g, stride_h, first, end, width_h, d, offs_n, offs_d, BT, BN, BD)
    p_into = into + split.to(tl.int64) * stride_split + offs_n.to(tl.int64)[:, None] * stride_i + offs_d[None, :]
    b_in = (offs_n < n)[:, None] & (offs_d < d)[None, :]
    if ADD:
        b_acc += tl.load(p_into, mask=b_in, other=0.0)
    tl.store(p_into, b_acc, mask=b_in)


@triton.jit
def _sum_of_splits(partials, at, b_in, stride_split, SPLITS: tl.constexpr, BD: tl.constexpr):
    b_sum = tl.zeros((BD,), tl.float32)  # [BD]
    for _ in tl.static_range(SPLITS):  # unrolled: all loads are on their way at once, the order of the sum is fixed
        b_sum += tl.load(partials + at, mask=b_in, other=0.0)
        partials += stride_split
    return b_sum


@triton.jit
def sparse_column_sum_fwd_kernel(
    partials, into, d, stride_i, stride_split, SPLITS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """into [n, d] += the sum of partials [SPLITS, n, d]; a program for BD elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_in = offs_d < d
    b_sum = _sum_of_splits(partials, row * d + offs_d, b_in, stride_split, SPLITS, BD)
    p_into = into + row * stride_i + offs_d
    tl.store(p_into, tl.load(p_into, mask=b_in, other=0.0) + b_sum, mask=b_in)


@triton.jit
def _advance(
    b_g, old, master, moment1, moment2, at, b_in,
    share1, beta2, share2, unbias2, eps, rate, pull, bound, DECAYED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """One step of Adam on the state at `at`, from the gradient b_g of any shape. Returns the new master."""
    b_m = tl.load(moment1 + at, mask=b_in, other=0.0)
    b_m += (b_g - b_m) * share1
    tl.store(moment1 + at, b_m, mask=b_in)
    b_v = tl.load(moment2 + at, mask=b_in, other=0.0)
    b_v = b_v * beta2 + b_g * b_g * share2
    tl.store(moment2 + at, b_v, mask=b_in)
    b_w = tl.load(master + at, mask=b_in, other=0.0)
    if DECAYED or BOUNDED:
        b_old = tl.load(old + at, mask=b_in, other=0.0)
    if DECAYED:
        b_w -= (b_w - b_old) * pull
    b_w -= tl.div_rn(b_m, tl.sqrt_rn(b_v * unbias2) + eps) * rate
    if BOUNDED:  # where NaN compares false and stays
        b_w = tl.where(b_w > b_old + bound, b_old + bound, b_w)
        b_w = tl.where(b_w < b_old - bound, b_old - bound, b_w)
    tl.store(master + at, b_w, mask=b_in)
    return b_w


@triton.jit
def sparse_column_update_fwd_kernel(
    weight, neurons, old, master, moment1, moment2, grad, d, count, stride_d, stride_n, stride_split,
    share1, beta2, share2, unbias2, eps, rate, pull, bound,
    DECAYED: tl.constexpr, BOUNDED: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program for BD elements of one neuron; grad is [SPLITS, n, d], of which the sum is the gradient."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_in = offs_d < d
    neuron = tl.load(neurons + row)
    at = row * d + offs_d
    b_g = _sum_of_splits(grad, at, b_in, stride_split, SPLITS, BD)  # [BD]
    b_w = _advance(
        b_g, old, master, moment1, moment2, at, b_in,
        share1, beta2, share2, unbias2, eps, rate, pull, bound, DECAYED, BOUNDED,
    )  # fmt: skip
    p_w = weight + neuron * stride_n + offs_d.to(tl.int64) * stride_d
    b_w = rounded(b_w, weight.dtype.element_ty)
    tl.store(p_w, b_w, mask=b_in & (neuron >= 0) & (neuron < count))


@triton.jit(do_not_specialize=["tokens", "n"])
def sparse_column_step_fwd_kernel(
    weight, neurons, old, master, moment1, moment2, grad_out, h, tokens, n, width_h, d, count,
    stride_d, stride_n, stride_g, stride_h,
    share1, beta2, share2, unbias2, eps, rate, pull, bound,
    DECAYED: tl.constexpr, BOUNDED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of BN neurons and BD elements of each, over all tokens, goes into Adam without leaving the SM."""
    tiles_n = tl.cdiv(n, BN)
    offs_n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    offs_d = tl.program_id(0) // tiles_n * BD + tl.arange(0, BD)
    b_g = _product(grad_out, h, stride_g, stride_h, 0, tokens, width_h, d, offs_n, offs_d, BT, BN, BD)
    b_in = (offs_n < n)[:, None] & (offs_d < d)[None, :]
    row = (tl.program_id(0) % tiles_n * BN).to(tl.int64) * d  # 64 bits once; within a tile 32 do, and save registers
    at = tl.arange(0, BN)[:, None] * d + offs_d[None, :]
    b_w = _advance(
        b_g, old + row, master + row, moment1 + row, moment2 + row, at, b_in,
        share1, beta2, share2, unbias2, eps, rate, pull, bound, DECAYED, BOUNDED,
    )  # fmt: skip
    b_neuron = tl.load(neurons + offs_n, mask=offs_n < n, other=-1)  # [BN]
    p_w = weight + b_neuron[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    b_w = rounded(b_w, weight.dtype.element_ty)
    tl.store(p_w, b_w, mask=b_in & ((b_neuron >= 0) & (b_neuron < count))[:, None])


@triton.jit
def write_columns_fwd_kernel(
    weight, neurons, values, d, count, stride_d, stride_n, stride_vn, stride_vd,
    BD: tl.constexpr,
):  # fmt: skip
    """A program for BD elements of one neuron. The weight's own dtype goes through bit for bit."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    neuron = tl.load(neurons + row)
    b_in = (offs_d < d) & (neuron >= 0) & (neuron < count)
    b_w = tl.load(values + row * stride_vn + offs_d * stride_vd, mask=b_in)  # [BD]
    if b_w.dtype != weight.dtype.element_ty:
        b_w = rounded(widened(b_w), weight.dtype.element_ty)
    tl.store(weight + neuron * stride_n + offs_d * stride_d, b_w, mask=b_in)
