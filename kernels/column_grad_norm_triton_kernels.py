"""The kernels of `column_grad_norm_triton`. Short requests go by the Gram matrix, the others directly.

Each program finds its tile of tokens, or its long request, from the offsets on the device (`triton_ragged`) and exits
where the other form has it. Programs leave partials [rows, D], fp32; a last kernel adds up what belongs to a request.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pke_fast.kernels.triton_parts import dot, rounded
from pke_fast.kernels.triton_ragged import find_tile, request_span


@triton.jit
def _store_gram(b_gram, b_at, inside, gram, gram_low, SPLIT: tl.constexpr):
    b_high = rounded(b_gram, gram.dtype.element_ty)
    tl.store(gram + b_at, b_high, mask=inside)
    if SPLIT:
        tl.store(gram_low + b_at, rounded(b_gram - b_high.to(tl.float32), gram.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "requests", "limit", "others", "steps"])
def column_grad_norm_gram_kernel(
    grad,
    offsets,
    gram,
    gram_low,
    parts,
    tokens,
    requests,
    hidden,
    grad_stride,
    width,
    limit,
    others,
    steps,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Block (tile, other <= tile) of K = G G^T, over one of PARTS ranges of the hidden size; row t, column s - start.

    Whole blocks are written, with zeros in the columns after a request's end. Blocks off the diagonal are doubled: each
    stands for its mirror image too.
    """
    part = tl.program_id(0) % PARTS
    other = (tl.program_id(0) // PARTS) % others
    slot = tl.program_id(0) // PARTS // others
    segment, tile, start, end = find_tile(offsets, slot, tokens, requests, BT, BR)
    first = start + tile * BT
    scored = (segment > 0) & (segment <= requests)
    if (first >= end) | (other > tile) | (end - start > limit) | (not scored):
        return
    b_token = first + tl.arange(0, BT)  # [BT]
    b_other = start + other * BT + tl.arange(0, BT)  # [BT]
    b_gram = tl.zeros([BT, BT], dtype=tl.float32)
    for k in range(part * steps * BK, tl.minimum((part + 1) * steps * BK, hidden), BK):
        b_k = k + tl.arange(0, BK)  # [BK]
        b_left = tl.load(
            grad + b_token[:, None] * grad_stride + b_k[None, :],
            mask=(b_token < end)[:, None] & (b_k < hidden)[None, :],
            other=0.0,
        )
        b_right = tl.load(
            grad + b_other[:, None] * grad_stride + b_k[None, :],
            mask=(b_other < end)[:, None] & (b_k < hidden)[None, :],
            other=0.0,
        )
        b_gram = dot(b_left, tl.trans(b_right), b_gram)
    b_gram = tl.where(other < tile, 2.0 * b_gram, b_gram)
    b_at = b_token[:, None] * width + (other * BT + tl.arange(0, BT))[None, :]
    inside = (b_token < end)[:, None]
    if PARTS == 1:
        _store_gram(b_gram, b_at, inside, gram, gram_low, SPLIT)
    else:
        tl.store(parts + part * (tokens * width.to(tl.int64)) + b_at, b_gram, mask=inside)


@triton.jit(do_not_specialize=["tokens", "requests", "limit", "others"])
def column_grad_norm_gram_sum_kernel(
    offsets,
    gram,
    gram_low,
    parts,
    tokens,
    requests,
    width,
    limit,
    others,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
):
    """Adds up the PARTS of K's blocks, BS rows in a program."""
    rows = tl.program_id(0) % (BT // BS)
    other = (tl.program_id(0) // (BT // BS)) % others
    slot = tl.program_id(0) // (BT // BS) // others
    segment, tile, start, end = find_tile(offsets, slot, tokens, requests, BT, BR)
    first = start + tile * BT + rows * BS
    scored = (segment > 0) & (segment <= requests)
    if (first >= end) | (other > tile) | (end - start > limit) | (not scored):
        return
    corner = first * width + other * BT
    b_row = tl.arange(0, BS)  # [BS]
    b_at = b_row[:, None] * width + tl.arange(0, BT)[None, :]  # in 32 bits: these are few rows
    inside = (b_row < end - first)[:, None]
    b_gram = tl.zeros([BS, BT], dtype=tl.float32)
    parts += corner
    for _ in range(PARTS):
        b_gram += tl.load(parts + b_at, mask=inside, other=0.0)
        parts += tokens * width.to(tl.int64)
    _store_gram(b_gram, b_at, inside, gram + corner, gram_low + corner, SPLIT)


@triton.jit
def _root(square):
    """Rounding can make a sum of squares negative; NaN stays."""
    return tl.sqrt(tl.where(square < 0.0, 0.0, square))


@triton.jit(do_not_specialize=["tokens", "requests", "limit", "slots"])
def column_grad_norm_tile_kernel(
    gram,
    gram_low,
    h,
    offsets,
    partials,
    norms,
    tokens,
    requests,
    neurons,
    h_stride,
    width,
    limit,
    slots,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """sum over a tile's tokens t of h_t * sum over s of K_ts h_s, for BD neurons."""
    # a long request's last tiles have most to do: they start first; neighbours share h's columns
    slot = slots - 1 - tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    segment, tile, start, end = find_tile(offsets, slot, tokens, requests, BT, BR)
    first = start + tile * BT
    scored = (segment > 0) & (segment <= requests)
    if ((first >= end) & (tile > 0)) | (end - start > limit) | (not scored):
        return
    last = tl.minimum(first + BT, end)
    b_token = first + tl.arange(0, BT)  # [BT]
    b_column = block * BD + tl.arange(0, BD)  # [BD]
    b_product = tl.zeros([BT, BD], dtype=tl.float32)
    for s in range(0, (last - start).to(tl.int32), BS):
        b_s = s + tl.arange(0, BS)  # [BS]
        b_h = tl.load(
            h + (start + b_s)[:, None] * h_stride + b_column[None, :],
            mask=(start + b_s < last)[:, None] & (b_column < neurons)[None, :],
            other=0.0,
        )
        b_at = b_token[:, None] * width + b_s[None, :]
        inside = (b_token < last)[:, None]  # the columns need no mask: whole blocks of K were written
        b_gram = tl.load(gram + b_at, mask=inside, other=0.0)
        if SPLIT:
            b_low = tl.load(gram_low + b_at, mask=inside, other=0.0)
            b_product = dot(b_low, b_h, b_product)
            b_product = dot(b_gram, b_h, b_product)
        elif h.dtype.element_ty == tl.float16:
            # fp16 is exact in tf32's 11 bits, and a tensor core drops the other bits of fp32
            b_high = (b_gram.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
            b_product = tl.dot(b_gram - b_high, b_h.to(tl.float32), b_product, input_precision="tf32")
            b_product = tl.dot(b_high, b_h.to(tl.float32), b_product, input_precision="tf32")
        else:
            b_product = dot(b_gram, b_h, b_product)
    b_h = tl.load(
        h + b_token[:, None] * h_stride + b_column[None, :],
        mask=(b_token < last)[:, None] & (b_column < neurons)[None, :],
        other=0.0,
    )
    b_square = tl.sum(b_product * b_h.to(tl.float32), 0)
    if end - start <= BT:
        tl.store(norms + (segment - 1).to(tl.int64) * neurons + b_column, _root(b_square), mask=b_column < neurons)
    else:
        tl.store(partials + slot.to(tl.int64) * neurons + b_column, b_square, mask=b_column < neurons)


@triton.jit(do_not_specialize=["tokens", "requests", "limit", "slots", "parts", "blocks"])
def column_grad_norm_direct_kernel(
    grad,
    h,
    offsets,
    partials,
    tokens,
    requests,
    hidden,
    neurons,
    grad_stride,
    h_stride,
    limit,
    slots,
    parts,
    blocks,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """sum over BM hidden dimensions of (G^T h)^2, for BD neurons of one long request."""
    part = tl.program_id(0) % parts
    block = (tl.program_id(0) // parts) % blocks
    place = tl.program_id(0) // parts // blocks
    # long requests start more than `limit` tokens apart: start // (limit + 1) is another number for each
    b_found = tl.zeros([BR], dtype=tl.int32)
    for i in range(0, requests, BR):
        b_request = i + tl.arange(0, BR)  # [BR]
        b_start, b_length = request_span(offsets, b_request, requests, tokens)
        here = (b_length > limit) & (b_start // (limit + 1) == place)
        b_found = tl.maximum(b_found, tl.where(here, b_request + 1, 0))
    found = tl.max(b_found, 0)
    if found == 0:
        return
    start, length = request_span(offsets, found - 1, requests, tokens)
    end = start + length
    b_dimension = part * BM + tl.arange(0, BM)  # [BM]
    b_column = block * BD + tl.arange(0, BD)  # [BD]
    b_product = tl.zeros([BM, BD], dtype=tl.float32)
    for t in range(0, length.to(tl.int32), BK):
        b_token = start + t + tl.arange(0, BK)  # [BK]
        b_grad = tl.load(
            grad + b_token[:, None] * grad_stride + b_dimension[None, :],
            mask=(b_token < end)[:, None] & (b_dimension < hidden)[None, :],
            other=0.0,
        )
        b_h = tl.load(
            h + b_token[:, None] * h_stride + b_column[None, :],
            mask=(b_token < end)[:, None] & (b_column < neurons)[None, :],
            other=0.0,
        )
        b_product = dot(tl.trans(b_grad), b_h, b_product)
    row = slots + place * parts + part
    at = row.to(tl.int64) * neurons + b_column
    tl.store(partials + at, tl.sum(b_product * b_product, 0), mask=b_column < neurons)


@triton.jit(do_not_specialize=["tokens", "requests", "limit", "slots", "parts"])
def column_grad_norm_root_kernel(
    offsets,
    partials,
    norms,
    tokens,
    requests,
    neurons,
    limit,
    slots,
    parts,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Norms of the requests that left more than one partial, in the partials' order, and zeros for the empty ones."""
    request = tl.program_id(0)
    b_column = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    start, length = request_span(offsets, request, requests, tokens)
    if (length > 0) & (length <= BT) & (length <= limit):
        return
    direct = length > limit
    rows = tl.where(direct, parts, tl.cdiv(length, BT))
    first = tl.where(direct, slots + start // (limit + 1) * parts, start // BT + request + 1)
    b_square = tl.zeros([BN, BD], dtype=tl.float32)
    for i in range(0, rows.to(tl.int32), BN):
        b_row = i + tl.arange(0, BN)  # [BN]
        inside = (b_row < rows)[:, None] & (b_column < neurons)[None, :]
        b_square += tl.load(partials + (first + b_row)[:, None] * neurons + b_column[None, :], mask=inside, other=0.0)
    at = request.to(tl.int64) * neurons + b_column
    tl.store(norms + at, _root(tl.sum(b_square, 0)), mask=b_column < neurons)
