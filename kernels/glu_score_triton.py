"""glu_score_fwd and glu_score_bwd in Triton: what is launched, and in blocks of which shape."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pke_fast.kernels.checks import with_dense_rows
from pke_fast.kernels.glu_score import check_arguments, halves
from pke_fast.kernels.glu_score_triton_kernels import (
    glu_score_bwd_kernel,
    glu_score_fwd_kernel,
    glu_score_fwd_statistics_kernel,
)
from pke_fast.kernels.triton_ragged import ragged_sum, searched, sum_blocks, tile_slots

ROW_BYTES = 512  # of a row in one program: a warp reads it with one 16-byte load a thread
SUBTILE = 8  # tokens at a time: with 4 warps, two 16-byte loads in flight for each thread and tensor
MOST_REGISTERS = 128  # a thread: four programs on a multiprocessor; without a limit ptxas aims higher, and spills
FEW = 512  # programs that are too few to fill a GPU: then the tiles are shorter


def _tile(tokens: int, neurons: int, width: int, most: int) -> int:
    """Tokens in a tile: `most` where that makes programs enough, 32 in a smaller job; from the shape alone."""
    return most if triton.cdiv(tokens, most) * triton.cdiv(neurons, width) >= FEW else 32


def fwd(
    gate: Tensor, up: Tensor | None, act: str, offsets: Tensor, mask: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`glu_score.reference_fwd` in one pass; offsets are taken to ascend within 0 .. T, their values aren't checked.

    Raises:
        InputError: a rank, shape, dtype, device or activation is wrong.
    """
    check_arguments("glu_score_fwd", gate, up, act, offsets, mask, fused)
    gate, up = halves(gate, up, fused)
    gate, up = with_dense_rows(gate), None if up is None else with_dense_rows(up)
    (tokens, neurons), requests = gate.shape, len(offsets) - 1
    h = torch.empty(tokens, neurons, dtype=gate.dtype, device=gate.device)
    mean = torch.empty(requests, neurons, dtype=torch.float32, device=gate.device)
    peak = torch.empty_like(mean)
    if h.numel() == 0:
        return h, mean.zero_(), peak.zero_()
    width = ROW_BYTES // gate.element_size()
    tile = _tile(tokens, neurons, width, 128)  # two partials for three tensors: 2 % of the bytes
    slots, blocks = tile_slots(tokens, requests, tile), triton.cdiv(neurons, width)
    several = tokens > tile  # whether a request can have more than one tile
    part_sum = torch.empty(slots if several else 0, neurons, dtype=torch.float32, device=gate.device)
    part_peak = torch.empty_like(part_sum)
    part_count = torch.empty(slots if several else 0, dtype=torch.int32, device=gate.device)
    offsets, masked = offsets.contiguous(), mask is not None
    glu_score_fwd_kernel[(slots * blocks,)](
        gate,
        gate if up is None else up,
        offsets,
        offsets if mask is None else mask.contiguous(),
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
        gate.stride(0),
        0 if up is None else up.stride(0),
        ACT=act,
        GATED=up is not None,
        MASKED=masked,
        BT=tile,
        BS=SUBTILE,
        BD=width,
        BR=searched(requests),
        num_warps=4,
        num_stages=1,
        maxnreg=MOST_REGISTERS,
    )
    if several and requests:
        rows, width = sum_blocks(requests, neurons)
        glu_score_fwd_statistics_kernel[(requests, triton.cdiv(neurons, width))](
            offsets,
            mean,
            peak,
            part_sum,
            part_peak,
            part_count,
            tokens,
            requests,
            neurons,
            MASKED=masked,
            BT=tile,
            BN=rows,
            BD=width,
            num_warps=4,
            num_stages=1,
        )
    return h, mean, peak


def bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    offsets: Tensor,
    mask: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`glu_score.reference_bwd` in one pass; offsets are taken to ascend within 0 .. T, their values aren't checked.

    Raises:
        InputError: a rank, shape, dtype, device or activation is wrong.
    """
    check_arguments("glu_score_bwd", gate, up, act, offsets, mask, fused, dh)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(0 if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    into_gate, into_up = halves(dgate, None if up is None else dup, fused)
    gate, up = halves(gate, up, fused)
    dh, gate, up = with_dense_rows(dh), with_dense_rows(gate), None if up is None else with_dense_rows(up)
    (tokens, neurons), requests = gate.shape, len(offsets) - 1
    path = torch.empty(requests, neurons, dtype=torch.float32, device=gate.device)
    if dh.numel() == 0:
        return dgate, dup, path.zero_()
    width = ROW_BYTES // gate.element_size()
    tile = _tile(tokens, neurons, width, 64)  # one partial for five tensors: 1.3 % of the bytes
    slots, blocks = tile_slots(tokens, requests, tile), triton.cdiv(neurons, width)
    several = tokens > tile
    part_path = torch.empty(slots if several else 0, neurons, dtype=torch.float32, device=gate.device)
    offsets = offsets.contiguous()
    glu_score_bwd_kernel[(slots * blocks,)](
        dh,
        gate,
        gate if up is None else up,
        offsets,
        offsets if mask is None else mask.contiguous(),
        into_gate,
        into_gate if into_up is None else into_up,
        path,
        part_path,
        tokens,
        requests,
        neurons,
        blocks,
        dh.stride(0),
        gate.stride(0),
        0 if up is None else up.stride(0),
        into_gate.stride(0),
        0 if into_up is None else into_up.stride(0),
        ACT=act,
        GATED=up is not None,
        MASKED=mask is not None,
        BT=tile,
        BS=SUBTILE,
        BD=width,
        BR=searched(requests),
        num_warps=4,
        num_stages=1,
        maxnreg=MOST_REGISTERS,
    )
    if several and requests:
        ragged_sum(part_path, path, offsets, tokens, tile)
    return dgate, dup, path
