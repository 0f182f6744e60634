"""column_grad_norm in Triton: what is launched, and in blocks of which shape.

Short requests: K = G G^T in blocks at and below the diagonal, then h^T K h by tiles. Long ones: G^T h by blocks, then
squares. Nothing of size [T, D] or [d, D] is written.

K is all that is kept between kernels, and its rounding is what counts, since h^T K h is a difference of large numbers
where tokens' gradients cancel. For bf16, K is kept as two bf16, 16 bits, for two products: with one, norms would be off
by several per cent there. For fp16 that is too little: K is kept in fp32 and split into two tf32, 22 bits. Products of
fp32 are left to ordinary fp32 arithmetic: a tensor core cuts its sums off instead of rounding them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pke_fast.kernels.checks import with_dense_rows
from pke_fast.kernels.column_grad_norm import check_arguments
from pke_fast.kernels.column_grad_norm_triton_kernels import (
    column_grad_norm_direct_kernel,
    column_grad_norm_gram_kernel,
    column_grad_norm_gram_sum_kernel,
    column_grad_norm_root_kernel,
    column_grad_norm_tile_kernel,
)
from pke_fast.kernels.triton_ragged import searched, sum_blocks, tile_slots

ENOUGH = 256  # programs that keep a GPU busy: K's sums are split over the hidden size until there are as many
MOST_PARTS = 16


def gram_limit(hidden: int, neurons: int) -> int:
    """The most tokens with which `gram_is_cheaper`."""
    return (hidden * neurons - 1) // (hidden + neurons)


@dataclass(frozen=True)
class Blocks:
    """Blocks by shape: tokens, tokens of an inner step, neurons, and hidden dimensions of a step; warps and stages."""

    tokens: int
    step: int
    neurons: int
    hidden: int
    square: int  # of the direct form: hidden dimensions by neurons
    warps: int
    stages: int


def blocks(tokens: int, requests: int, hidden: int, neurons: int, dtype: torch.dtype) -> Blocks:
    """As many tokens in a tile as a request has on average, in sizes that compile without spilling registers."""
    fp32 = dtype == torch.float32
    tile = min(max(16, triton.next_power_of_2(triton.cdiv(tokens, requests))), 128 if dtype == torch.bfloat16 else 64)
    widest = 4096 // tile if fp32 else 256 if tile <= 32 else 128
    return Blocks(
        tokens=tile,
        step=min(tile, 16 if fp32 else 32),
        neurons=min(max(16, triton.next_power_of_2(neurons)), widest),
        hidden=min(max(16, triton.next_power_of_2(hidden)), 32 if fp32 else 64),
        square=min(max(16, triton.next_power_of_2(min(hidden, neurons))), 64 if fp32 else 128),
        warps=8 if tile == 128 else 4,
        stages=2 if fp32 else 3,
    )


def parts(tokens: int, requests: int, hidden: int, block: Blocks) -> int:
    """Into how many ranges of the hidden size K's sums may be split: programs enough, and four steps in each."""
    tiles = triton.cdiv(triton.cdiv(tokens, requests), block.tokens)
    programs = requests * tiles * (tiles + 1) // 2
    steps = triton.cdiv(hidden, block.hidden)
    return max(1, min(MOST_PARTS, triton.cdiv(ENOUGH, programs), steps // 4))


def column_grad_norm(grad_out: Tensor, h: Tensor, offsets: Tensor, longest: int | None = None) -> Tensor:
    """`column_grad_norm.reference`; offsets are taken to ascend within 0 .. T, by `longest` at most; nobody checks.

    Scratch: fp32 [T, min(longest, limit)] for K, and up to 16 times that, but no more than h takes, where K's sums are
    split; fp32 [partials, D].

    Raises:
        InputError: a rank, shape, dtype or device is wrong.
    """
    check_arguments(grad_out, h, offsets, longest)
    if grad_out.dtype != h.dtype:
        grad_out, h = grad_out.float(), h.float()
    grad_out, h, offsets = with_dense_rows(grad_out), with_dense_rows(h), offsets.contiguous()
    (tokens, hidden), neurons, requests = grad_out.shape, h.shape[1], len(offsets) - 1
    norms = torch.empty(requests, neurons, dtype=torch.float32, device=h.device)
    longest = tokens if longest is None else min(tokens, longest)
    if norms.numel() == 0 or grad_out.numel() == 0 or longest == 0:
        return norms.zero_()
    limit = gram_limit(hidden, neurons)
    block = blocks(tokens, requests, hidden, neurons, h.dtype)
    slots = tile_slots(tokens, requests, block.tokens) if limit else 0
    long_slots = tokens // (limit + 1) if longest > limit else 0
    hidden_blocks = triton.cdiv(hidden, block.square)
    partials = torch.empty(slots + long_slots * hidden_blocks, neurons, dtype=torch.float32, device=h.device)
    if limit:
        _by_gram(grad_out, h, offsets, partials, norms, limit, min(limit, longest), slots, block)
    if long_slots:
        column_grad_norm_direct_kernel[(long_slots * hidden_blocks * triton.cdiv(neurons, block.square),)](
            grad_out,
            h,
            offsets,
            partials,
            tokens,
            requests,
            hidden,
            neurons,
            grad_out.stride(0),
            h.stride(0),
            limit,
            slots,
            hidden_blocks,
            triton.cdiv(neurons, block.square),
            BM=block.square,
            BK=16 if h.dtype == torch.float32 else 32,
            BD=block.square,
            BR=searched(requests),
            num_warps=8 if block.square == 128 else 4,
            num_stages=block.stages,
        )
    if long_slots or longest > block.tokens:
        rows, width = sum_blocks(requests, neurons)
        column_grad_norm_root_kernel[(requests, triton.cdiv(neurons, width))](
            offsets,
            partials,
            norms,
            tokens,
            requests,
            neurons,
            limit,
            slots,
            hidden_blocks,
            BT=block.tokens,
            BN=rows,
            BD=width,
            num_warps=4,
            num_stages=1,
        )
    return norms


def _by_gram(
    grad: Tensor,
    h: Tensor,
    offsets: Tensor,
    partials: Tensor,
    norms: Tensor,
    limit: int,
    longest: int,
    slots: int,
    block: Blocks,
) -> None:
    """The norms of the requests of at most `limit` tokens, or their tiles' partials; these have `longest` at most."""
    (tokens, hidden), (requests, neurons) = grad.shape, norms.shape
    split = h.dtype == torch.bfloat16
    others = triton.cdiv(longest, block.tokens)  # blocks in a row of K
    width = others * block.tokens
    gram = torch.empty(tokens, width, dtype=torch.bfloat16 if split else torch.float32, device=h.device)
    gram_low = torch.empty_like(gram) if split else gram
    room = h.nbytes // (4 * tokens * width)  # the peak of a layer's way back has room for one more tensor like h
    several = max(1, min(parts(tokens, requests, hidden, block), room))
    several = 2 ** (several.bit_length() - 1)  # each other number is another variant to compile
    sums = gram if several == 1 else torch.empty(several, tokens, width, dtype=torch.float32, device=h.device)
    where = {"BT": block.tokens, "BR": searched(requests)}
    column_grad_norm_gram_kernel[(slots * others * several,)](
        grad,
        offsets,
        gram,
        gram_low,
        sums,
        tokens,
        requests,
        hidden,
        grad.stride(0),
        width,
        limit,
        others,
        triton.cdiv(triton.cdiv(hidden, block.hidden), several),
        PARTS=several,
        SPLIT=split,
        BK=block.hidden,
        **where,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    if several > 1:
        column_grad_norm_gram_sum_kernel[(slots * others * (block.tokens // 16),)](
            offsets,
            gram,
            gram_low,
            sums,
            tokens,
            requests,
            width,
            limit,
            others,
            PARTS=several,
            SPLIT=split,
            BS=16,
            **where,
            num_warps=4,
            num_stages=1,
        )
    column_grad_norm_tile_kernel[(slots * triton.cdiv(neurons, block.neurons),)](
        gram,
        gram_low,
        h,
        offsets,
        partials,
        norms,
        tokens,
        requests,
        neurons,
        h.stride(0),
        width,
        limit,
        slots,
        SPLIT=split,
        BS=block.step,
        BD=block.neurons,
        **where,
        num_warps=block.warps,
        num_stages=block.stages,
    )
