"""The kernels of `glu_score_triton`: one pass over the tokens, with the statistics as partials by tile.

A program takes one tile of tokens (`triton_ragged`) and BD neurons, and walks through the tile BS tokens at a time. The
statistics stay in registers until the tile is done: a request of one tile has its results then; the others leave fp32
partials [slots, D], which a second kernel adds up in the tiles' order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pke_fast.kernels.triton_activations import activation
from pke_fast.kernels.triton_parts import rounded
from pke_fast.kernels.triton_ragged import find_tile, request_span


@triton.jit
def _size_bits(x):
    """|x| as an integer: ordered as |x| is, with NaN above infinity, so that a maximum doesn't lose a NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["tokens", "requests"])
def glu_score_fwd_kernel(
    gate,
    up,
    offsets,
    mask,
    h,
    mean,
    peak,
    part_sum,
    part_peak,
    part_count,
    tokens,
    requests,
    neurons,
    blocks,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    segment, tile, start, end = find_tile(offsets, slot, tokens, requests, BT, BR)
    first = start + tile * BT
    scored = (segment > 0) & (segment <= requests)
    if (first >= end) & ((tile > 0) | (not scored)):  # an empty request has its zeros to write
        return
    last = tl.minimum(first + BT, end)
    gate += first * gate_stride
    up += first * up_stride
    h += first * neurons
    mask += first

    b_column = block * BD + tl.arange(0, BD)  # [BD]
    b_sum = tl.zeros([BS, BD], dtype=tl.float32)
    b_peak = tl.zeros([BS, BD], dtype=tl.int32)
    b_count = tl.zeros([BS], dtype=tl.int32)
    rows = (last - first).to(tl.int32)
    for i in range(0, rows, BS):  # an int64 counter would hide from Triton how rows are aligned
        b_row = i + tl.arange(0, BS)  # [BS]
        inside = (b_row < rows)[:, None] & (b_column < neurons)[None, :]
        b_gate = tl.load(gate + b_row[:, None].to(tl.int64) * gate_stride + b_column[None, :], mask=inside, other=0.0)
        b_h, _ = activation(b_gate.to(tl.float32), ACT)
        if GATED:
            b_up = tl.load(up + b_row[:, None].to(tl.int64) * up_stride + b_column[None, :], mask=inside, other=0.0)
            b_h *= b_up.to(tl.float32)
        tl.store(
            h + b_row[:, None].to(tl.int64) * neurons + b_column[None, :], rounded(b_h, h.dtype.element_ty), mask=inside
        )
        if MASKED:
            b_counts = tl.load(mask + b_row, mask=b_row < rows, other=0) != 0
            b_count += b_counts.to(tl.int32)
            b_h = tl.where(b_counts[:, None], b_h, 0.0)
        b_sum += tl.abs(b_h)
        b_peak = tl.maximum(b_peak, _size_bits(b_h))

    if not scored:
        return
    count = tl.sum(b_count, 0) if MASKED else (last - first).to(tl.int32)
    b_total = tl.sum(b_sum, 0)
    b_most = tl.max(b_peak, 0).to(tl.float32, bitcast=True)
    if end - start <= BT:
        at = (segment - 1).to(tl.int64) * neurons + b_column
        tl.store(mean + at, b_total / tl.maximum(count, 1).to(tl.float32), mask=b_column < neurons)
        tl.store(peak + at, b_most, mask=b_column < neurons)
    else:
        at = slot.to(tl.int64) * neurons + b_column
        tl.store(part_sum + at, b_total, mask=b_column < neurons)
        tl.store(part_peak + at, b_most, mask=b_column < neurons)
        if MASKED:
            tl.store(part_count + slot, count, mask=block == 0)


@triton.jit(do_not_specialize=["tokens", "requests"])
def glu_score_fwd_statistics_kernel(
    offsets,
    mean,
    peak,
    part_sum,
    part_peak,
    part_count,
    tokens,
    requests,
    neurons,
    MASKED: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Mean and peak of the requests of more than one tile, from their tiles' partials."""
    request = tl.program_id(0)
    b_column = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    start, length = request_span(offsets, request, requests, tokens)
    if length <= BT:
        return
    tiles = tl.cdiv(length, BT).to(tl.int32)
    first = start // BT + request + 1
    b_sum = tl.zeros([BN, BD], dtype=tl.float32)
    b_peak = tl.zeros([BN, BD], dtype=tl.int32)
    b_count = tl.zeros([BN], dtype=tl.int32)
    for i in range(0, tiles, BN):
        b_tile = i + tl.arange(0, BN)  # [BN]
        inside = (b_tile < tiles)[:, None] & (b_column < neurons)[None, :]
        at = (first + b_tile)[:, None] * neurons + b_column[None, :]
        b_sum += tl.load(part_sum + at, mask=inside, other=0.0)
        b_peak = tl.maximum(b_peak, _size_bits(tl.load(part_peak + at, mask=inside, other=0.0)))
        if MASKED:
            b_count += tl.load(part_count + first + b_tile, mask=b_tile < tiles, other=0)
    count = tl.maximum(tl.sum(b_count, 0), 1) if MASKED else length.to(tl.int32)
    at = request.to(tl.int64) * neurons + b_column
    tl.store(mean + at, tl.sum(b_sum, 0) / count.to(tl.float32), mask=b_column < neurons)
    tl.store(peak + at, tl.max(b_peak, 0).to(tl.float32, bitcast=True), mask=b_column < neurons)


@triton.jit(do_not_specialize=["tokens", "requests"])
def glu_score_bwd_kernel(
    dh,
    gate,
    up,
    offsets,
    mask,
    dgate,
    dup,
    path,
    part_path,
    tokens,
    requests,
    neurons,
    blocks,
    dh_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    segment, tile, start, end = find_tile(offsets, slot, tokens, requests, BT, BR)
    first = start + tile * BT
    scored = (segment > 0) & (segment <= requests)
    if (first >= end) & ((tile > 0) | (not scored)):  # an empty request has its zeros to write
        return
    last = tl.minimum(first + BT, end)
    dh += first * dh_stride
    gate += first * gate_stride
    up += first * up_stride
    dgate += first * dgate_stride
    dup += first * dup_stride
    mask += first

    b_column = block * BD + tl.arange(0, BD)  # [BD]
    b_path = tl.zeros([BS, BD], dtype=tl.float32)
    rows = (last - first).to(tl.int32)
    for i in range(0, rows, BS):  # an int64 counter would hide from Triton how rows are aligned
        b_row = i + tl.arange(0, BS)  # [BS]
        inside = (b_row < rows)[:, None] & (b_column < neurons)[None, :]
        b_gate = tl.load(gate + b_row[:, None].to(tl.int64) * gate_stride + b_column[None, :], mask=inside, other=0.0)
        b_dh = tl.load(dh + b_row[:, None].to(tl.int64) * dh_stride + b_column[None, :], mask=inside, other=0.0)
        b_active, b_slope = activation(b_gate.to(tl.float32), ACT)
        b_dactive = b_dh.to(tl.float32)
        if GATED:
            b_up = tl.load(up + b_row[:, None].to(tl.int64) * up_stride + b_column[None, :], mask=inside, other=0.0)
            b_dup = rounded(b_active * b_dactive, dup.dtype.element_ty)
            tl.store(dup + b_row[:, None].to(tl.int64) * dup_stride + b_column[None, :], b_dup, mask=inside)
            b_dactive *= b_up.to(tl.float32)
        b_dgate = rounded(b_slope * b_dactive, dgate.dtype.element_ty)
        tl.store(dgate + b_row[:, None].to(tl.int64) * dgate_stride + b_column[None, :], b_dgate, mask=inside)
        b_size = tl.abs(b_active * b_dactive)  # |act * up * dh|
        if MASKED:
            b_counts = tl.load(mask + b_row, mask=b_row < rows, other=0) != 0
            b_size = tl.where(b_counts[:, None], b_size, 0.0)
        b_path += b_size

    if not scored:
        return
    b_total = tl.sum(b_path, 0)
    if end - start <= BT:
        tl.store(path + (segment - 1).to(tl.int64) * neurons + b_column, b_total, mask=b_column < neurons)
    else:
        tl.store(part_path + slot.to(tl.int64) * neurons + b_column, b_total, mask=b_column < neurons)
