"""The Triton kernels behind edit_loss_triton.py: what happens to a chunk of the logits between the two matmuls.

Sums over the vocabulary are kept by tile of BV logits: `partials` fp32 [planes, N, tiles] holds each tile's maximum,
the sum of exponentials relative to it, and so on; whoever needs the total adds the tiles up again, in a fixed order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pke_fast.kernels.triton_parts import rounded, widened

# Probabilities go into the second matmul times this: fp16 would lose the small ones, and overflow if they weren't
# normalised at all.
GAIN = tl.constexpr(256.0)


@triton.jit
def _tanh(b_x):
    """To an ulp or two, for small x too (the polynomial is Cephes', S. Moshier)."""
    b_z = b_x * b_x
    b_p = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_p = b_p * b_z - 5.37397155531e-2
    b_p = b_p * b_z + 1.33314422036e-1
    b_p = b_p * b_z - 3.33332819422e-1
    b_small = b_p * b_z * b_x + b_x
    b_size = tl.abs(b_x)
    b_large = 1.0 - 2.0 / (tl.exp(2.0 * b_size) + 1.0)
    return tl.where(b_size < 0.625, b_small, tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def _log1p(b_x):
    """For x in 0 .. 1: the rounding of 1 + x is divided out again."""
    b_u = 1.0 + b_x
    b_off = b_u - 1.0
    return tl.where(b_off == 0.0, b_x, tl.log(b_u) * (b_x / tl.where(b_off == 0.0, 1.0, b_off)))


@triton.jit
def _logits(b_raw, scale, cap, CAPPED: tl.constexpr):
    """What `edit_loss.logits_of` makes of the matmul's result."""
    b_l = widened(b_raw) * scale
    if CAPPED:
        b_l = _tanh(b_l / cap) * cap
    return b_l


@triton.jit
def _sloped(b_x, b_l, cap, CAPPED: tl.constexpr):
    """b_x times d(logit) / d(scaled matmul's result), at the logit b_l."""
    if CAPPED:
        b_x *= 1.0 - (b_l / cap) * (b_l / cap)
    return b_x


@triton.jit
def _finite(x):
    """A maximum that can be subtracted: of no logits at all it is -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _total(peaks, sums, end, TILES: tl.constexpr):
    """The maximum and the sum of exponentials relative to it, over one position's first `end` tiles."""
    b_tile = tl.arange(0, TILES)
    b_peak = tl.load(peaks + b_tile, mask=b_tile < end, other=float("-inf"))
    b_sum = tl.load(sums + b_tile, mask=b_tile < end, other=0.0)
    peak = tl.max(b_peak, 0)
    return peak, tl.sum(b_sum * tl.exp(b_peak - _finite(peak)), 0)


@triton.jit(do_not_specialize=["first", "width", "tile_0"])  # one compilation for all chunks
def edit_loss_ce_stats_fwd_kernel(
    logits, targets, target_logits, partials, stride_l, first, width, padded, tile_0, tiles, scale, cap,
    CAPPED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of one tile, the target left out; the target's logit by itself.

    logits: [N, padded] of which `width` are the vocabulary's from `first` on; the rest holds anything.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    b_v = tile * BV + tl.arange(0, BV)
    mine = tl.load(targets + row) - first
    b_raw = tl.load(logits + row * stride_l + b_v, mask=b_v < padded, other=0.0)  # [BV]
    b_l = _logits(b_raw, scale, cap, CAPPED)
    b_l = tl.where((b_v < width) & (b_v != mine), b_l, float("-inf"))
    peak = tl.max(b_l, 0)
    p_tile = partials + row * tiles + tile_0 + tile
    tl.store(p_tile, peak)
    tl.store(p_tile + tl.num_programs(0).to(tl.int64) * tiles, tl.sum(tl.exp(b_l - _finite(peak)), 0))
    here = (mine >= tile * BV) & (mine < tile * BV + BV) & (mine < width)
    target = tl.load(logits + row * stride_l + mine, mask=here, other=0.0)
    tl.store(target_logits + row, _logits(target, scale, cap, CAPPED), mask=here)


@triton.jit(do_not_specialize=["first", "width", "end"])
def edit_loss_ce_probs_fwd_kernel(
    logits, targets, partials, stride_l, first, width, padded, end, tiles, scale, cap,
    CAPPED: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """In place of the logits: probabilities among all but the target in the first `end` tiles, sloped, times GAIN."""
    row = tl.program_id(0).to(tl.int64)
    b_v = tl.program_id(1) * BV + tl.arange(0, BV)
    p_peaks = partials + row * tiles
    peak, total = _total(p_peaks, p_peaks + tl.num_programs(0).to(tl.int64) * tiles, end, TILES)
    mine = tl.load(targets + row) - first
    p_l = logits + row * stride_l + b_v
    b_l = _logits(tl.load(p_l, mask=b_v < padded, other=0.0), scale, cap, CAPPED)  # [BV]
    b_p = tl.exp(b_l - _finite(peak)) * (GAIN / tl.where(total == 0.0, 1.0, total))
    b_p = tl.where((b_v < width) & (b_v != mine), _sloped(b_p, b_l, cap, CAPPED), 0.0)
    tl.store(p_l, rounded(b_p, logits.dtype.element_ty), mask=b_v < padded)


@triton.jit(do_not_specialize=["width", "tile_0"])
def edit_loss_kl_stats_fwd_kernel(
    logits, base_logits, partials, stride_l, width, padded, tile_0, tiles, scale, cap,
    CAPPED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one tile: both sides' maximum and sum of exponentials, and the sum of exp(base) * (base - logit)."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    b_v = tile * BV + tl.arange(0, BV)
    at = row * stride_l + b_v
    b_in = b_v < width
    b_l = _logits(tl.load(logits + at, mask=b_v < padded, other=0.0), scale, cap, CAPPED)  # [BV]
    b_b = _logits(tl.load(base_logits + at, mask=b_v < padded, other=0.0), scale, cap, CAPPED)
    peak_l = tl.max(tl.where(b_in, b_l, float("-inf")), 0)
    peak_b = tl.max(tl.where(b_in, b_b, float("-inf")), 0)
    b_e = tl.where(b_in, tl.exp(b_l - _finite(peak_l)), 0.0)
    b_f = tl.where(b_in, tl.exp(b_b - _finite(peak_b)), 0.0)
    plane = tl.num_programs(0).to(tl.int64) * tiles
    p_tile = partials + row * tiles + tile_0 + tile
    tl.store(p_tile, peak_l)
    tl.store(p_tile + plane, tl.sum(b_e, 0))
    tl.store(p_tile + 2 * plane, peak_b)
    tl.store(p_tile + 3 * plane, tl.sum(b_f, 0))
    tl.store(p_tile + 4 * plane, tl.sum(tl.where(b_in, b_f * (b_b - b_l), 0.0), 0))


@triton.jit(do_not_specialize=["width"])
def edit_loss_kl_diff_fwd_kernel(
    logits, base_logits, partials, stride_l, width, padded, tiles, scale, cap,
    CAPPED: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """In place of the logits: (p - p_base) * slope * GAIN, rounded after the difference is taken."""
    row = tl.program_id(0).to(tl.int64)
    b_v = tl.program_id(1) * BV + tl.arange(0, BV)
    plane = tl.num_programs(0).to(tl.int64) * tiles
    p_sums = partials + row * tiles
    peak_l, total_l = _total(p_sums, p_sums + plane, tiles, TILES)
    peak_b, total_b = _total(p_sums + 2 * plane, p_sums + 3 * plane, tiles, TILES)
    at = row * stride_l + b_v
    b_l = _logits(tl.load(logits + at, mask=b_v < padded, other=0.0), scale, cap, CAPPED)  # [BV]
    b_b = _logits(tl.load(base_logits + at, mask=b_v < padded, other=0.0), scale, cap, CAPPED)
    b_d = tl.exp(b_l - _finite(peak_l)) * (GAIN / total_l) - tl.exp(b_b - _finite(peak_b)) * (GAIN / total_b)
    b_d = tl.where(b_v < width, _sloped(b_d, b_l, cap, CAPPED), 0.0)
    tl.store(logits + at, rounded(b_d, logits.dtype.element_ty), mask=b_v < padded)


@triton.jit
def _gathered(
    part, acc, partials, row, at, b_in, before, end, tiles,
    KEPT: tl.constexpr, RESCALED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The chunk's product plus, if any is KEPT, that of the chunks before: RESCALED from their total to the new one."""
    b_a = widened(tl.load(part + at, mask=b_in, other=0.0))  # [BD]
    if KEPT:
        b_old = tl.load(acc + at, mask=b_in, other=0.0)
        if RESCALED:
            p_peaks = partials + row * tiles
            p_sums = p_peaks + tl.num_programs(0).to(tl.int64) * tiles
            old_peak, old = _total(p_peaks, p_sums, before, TILES)
            peak, total = _total(p_peaks, p_sums, end, TILES)
            b_old *= tl.exp(old_peak - _finite(peak)) * (old / tl.where(total == 0.0, 1.0, total))
        b_a += b_old
    return b_a


@triton.jit(do_not_specialize=["before", "end"])
def edit_loss_add_fwd_kernel(
    part, acc, partials, d, before, end, tiles,
    KEPT: tl.constexpr, RESCALED: tl.constexpr, TILES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """acc fp32 [N, d]: the chunk's product in the model's dtype is added to those before."""
    row = tl.program_id(0).to(tl.int64)
    b_d = tl.program_id(1) * BD + tl.arange(0, BD)
    at, b_in = row * d + b_d, b_d < d
    b_a = _gathered(
        part, acc, partials, row, at, b_in, before, end, tiles, KEPT, RESCALED, TILES
    )  # fmt: skip
    tl.store(acc + at, b_a, mask=b_in)


@triton.jit(do_not_specialize=["before"])
def edit_loss_ce_last_fwd_kernel(
    part, acc, partials, head, targets, target_logits, weights, losses, grad, d,
    stride_v, stride_h, stride_g, stride_gd, before, tiles, vocabulary, scale, cap,
    CAPPED: tl.constexpr, KEPT: tl.constexpr, TILES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Loss and gradient, from the others' mean of the head and the target's own row of it.

    With z = log(sum over the others) - the target's logit, the loss is log(1 + e^z) and the others' probability is
    q = 1 / (1 + e^-z): nothing cancels where the target is nearly certain.
    """
    row = tl.program_id(0).to(tl.int64)
    b_d = tl.program_id(1) * BD + tl.arange(0, BD)
    at, b_in = row * d + b_d, b_d < d
    b_a = _gathered(
        part, acc, partials, row, at, b_in, before, tiles, tiles, KEPT, True, TILES
    )  # fmt: skip
    p_peaks = partials + row * tiles
    peak, total = _total(p_peaks, p_peaks + tl.num_programs(0).to(tl.int64) * tiles, tiles, TILES)
    target, logit = tl.load(targets + row), tl.load(target_logits + row)
    z = (peak - logit) + tl.log(total)
    e = tl.exp(-tl.abs(z))
    q = tl.where(z > 0, 1.0, e) / (1.0 + e)
    if tl.program_id(1) == 0:
        tl.store(losses + row, tl.where(z > 0, z, 0.0) + _log1p(e))
    known = (target >= 0) & (target < vocabulary)  # of another, the logit is NaN
    b_t = tl.load(head + target * stride_v + b_d.to(tl.int64) * stride_h, mask=b_in & known, other=0.0)
    b_t = _sloped(widened(b_t), logit, cap, CAPPED)
    b_g = (b_a * (1.0 / GAIN) - b_t) * (tl.load(weights + row) * scale * q)
    p_g = grad + row * stride_g + b_d.to(tl.int64) * stride_gd
    tl.store(p_g, rounded(b_g, grad.dtype.element_ty), mask=b_in)


@triton.jit
def edit_loss_kl_last_fwd_kernel(
    part, acc, partials, weights, losses, grad, d, stride_g, stride_gd, tiles, scale,
    KEPT: tl.constexpr, TILES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Loss and gradient: KL = sum p_base (base - logit) + log(sum exp logit) - log(sum exp base)."""
    row = tl.program_id(0).to(tl.int64)
    b_d = tl.program_id(1) * BD + tl.arange(0, BD)
    at, b_in = row * d + b_d, b_d < d
    b_a = _gathered(
        part, acc, partials, row, at, b_in, 0, tiles, tiles, KEPT, False, TILES
    )  # fmt: skip
    if tl.program_id(1) == 0:
        plane = tl.num_programs(0).to(tl.int64) * tiles
        p_sums = partials + row * tiles
        peak_l, total_l = _total(p_sums, p_sums + plane, tiles, TILES)
        peak_b, total_b = _total(p_sums + 2 * plane, p_sums + 3 * plane, tiles, TILES)
        _, cross = _total(p_sums + 2 * plane, p_sums + 4 * plane, tiles, TILES)
        tl.store(losses + row, cross / total_b + (peak_l - peak_b) + (tl.log(total_l) - tl.log(total_b)))
    b_g = b_a * (tl.load(weights + row) * scale * (1.0 / GAIN))
    p_g = grad + row * stride_g + b_d.to(tl.int64) * stride_gd
    tl.store(p_g, rounded(b_g, grad.dtype.element_ty), mask=b_in)
