"""What the Triton kernels over requests of unequal lengths share: tiles of tokens, and the sums of what tiles leave.

The tokens fall into segments: those before the first request, each request, those after the last one. A segment is cut
into tiles of BT tokens from its own start, so that no tile crosses a request and a request's sums don't depend on what
else is in the batch. The tile slots of segment i begin at start_i // BT + i: a segment never needs more slots than lie
before the next one's, so a slot finds its tokens by comparing alone, without a scan and without the host knowing any
length. Slots that no tile needs exit at once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SEARCHED = 1024  # offsets compared at once; more requests than that are gone through in a loop
LEAST_SEARCHED = 16  # fewer requests take as long, and each power of two is another variant; with 32 gram blocks spill


def tile_slots(tokens: int, requests: int, tile: int) -> int:
    """How many slots the tiles of all segments lie in."""
    return tokens // tile + requests + 2


def searched(requests: int) -> int:
    """The constexpr BR of `find_tile`."""
    return min(SEARCHED, max(LEAST_SEARCHED, triton.next_power_of_2(requests + 2)))


@triton.jit
def request_span(offsets, request, requests, tokens):
    """-> the first token of a request, or of each in a block, and the number of its tokens; 0 past the last request."""
    start = tl.load(offsets + request, mask=request < requests, other=0)
    end = tl.load(offsets + request + 1, mask=request < requests, other=0)
    start = tl.minimum(tl.maximum(start, 0), tokens)  # whatever the offsets hold, no token outside is touched
    return start, tl.minimum(tl.maximum(end, start), tokens) - start


@triton.jit
def find_tile(offsets, slot, tokens, requests, BT: tl.constexpr, BR: tl.constexpr):
    """-> the segment that owns a slot, the slot's place in it, the segment's first token and the one after its last."""
    b_before = tl.zeros([BR], dtype=tl.int32)
    for i in range(0, requests + 2, BR):
        b_segment = i + tl.arange(0, BR)  # [BR]
        b_start = tl.load(offsets + b_segment - 1, mask=(b_segment > 0) & (b_segment < requests + 2), other=0)
        b_start = tl.minimum(tl.maximum(b_start, 0), tokens)
        b_before += ((b_start // BT + b_segment <= slot) & (b_segment < requests + 2)).to(tl.int32)
    segment = tl.sum(b_before, 0) - 1
    start = tl.load(offsets + segment - 1, mask=segment > 0, other=0)
    end = tl.load(offsets + segment, mask=segment <= requests, other=tokens)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.minimum(tl.maximum(end, start), tokens)
    return segment, slot - (start // BT + segment), start, end


@triton.jit(do_not_specialize=["tokens", "requests"])
def ragged_sum_kernel(
    partials, sums, offsets, tokens, requests, neurons, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """sums[r] = the partials of request r's tiles, in their order; requests of one tile have written theirs already."""
    request = tl.program_id(0)
    b_column = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    start, length = request_span(offsets, request, requests, tokens)
    if length <= BT:
        return
    tiles = tl.cdiv(length, BT).to(tl.int32)
    first = start // BT + request + 1
    b_sum = tl.zeros([BN, BD], dtype=tl.float32)
    for i in range(0, tiles, BN):
        b_tile = i + tl.arange(0, BN)  # [BN]
        inside = (b_tile < tiles)[:, None] & (b_column < neurons)[None, :]
        b_sum += tl.load(partials + (first + b_tile)[:, None] * neurons + b_column[None, :], mask=inside, other=0.0)
    tl.store(sums + request.to(tl.int64) * neurons + b_column, tl.sum(b_sum, 0), mask=b_column < neurons)


def sum_blocks(requests: int, neurons: int) -> tuple[int, int]:
    """Partials and neurons at once when partials are added up: narrow, unless that makes too many programs."""
    width = 128 if requests * triton.cdiv(neurons, 128) <= 1024 else 512
    return 2048 // width, width


def ragged_sum(partials: Tensor, sums: Tensor, offsets: Tensor, tokens: int, tile: int) -> None:
    """Adds up the tiles' partials [slots, D] into sums [R, D], both fp32, for the requests of more than one tile."""
    requests, neurons = sums.shape
    rows, width = sum_blocks(requests, neurons)
    ragged_sum_kernel[(requests, triton.cdiv(neurons, width))](
        partials, sums, offsets, tokens, requests, neurons, BT=tile, BN=rows, BD=width, num_warps=4, num_stages=1
    )
