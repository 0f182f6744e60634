"""The Triton form of edit_loss: torch multiplies by a chunk of the vocabulary, Triton does the rest.

Only [N, chunk] logits exist at a time. The cross-entropy takes one sweep over the vocabulary, as attention does whose
keys and values are both the head: what was summed up so far is rescaled when the total grows. The KL takes two, for
p - p_base is a small difference that has to be taken before it is rounded, and needs both totals first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pke_fast.kernels.edit_loss import check_arguments
from pke_fast.kernels.edit_loss_triton_kernels import (
    edit_loss_add_fwd_kernel,
    edit_loss_ce_last_fwd_kernel,
    edit_loss_ce_probs_fwd_kernel,
    edit_loss_ce_stats_fwd_kernel,
    edit_loss_kl_diff_fwd_kernel,
    edit_loss_kl_last_fwd_kernel,
    edit_loss_kl_stats_fwd_kernel,
)

LOGITS = 1 << 24  # alive at once, of both sides: 32 MiB in bf16, and matmuls of at least 4096 columns
ROWS = 2048  # positions at a time
TILE = 4096  # logits a program
PAD = 16  # elements: rows of logits begin at a multiple of it, whatever the vocabulary


class _Chunk(NamedTuple):
    """A part of the vocabulary: tokens first .. end - 1, which are the tiles tile_0 .. tile_end - 1."""

    first: int
    end: int
    tile_0: int
    tile_end: int

    @property
    def width(self) -> int:
        return self.end - self.first

    @property
    def padded(self) -> int:
        return triton.cdiv(self.width, PAD) * PAD


def chunks_of(rows: int, vocabulary: int, sides: int) -> tuple[list[_Chunk], int]:
    """The chunks for so many positions and sides (1 for the cross-entropy, 2 for the KL), and the tile's size."""
    tile = min(TILE, max(PAD, triton.next_power_of_2(vocabulary)))
    tiles, step = triton.cdiv(vocabulary, tile), max(1, LOGITS // (rows * sides * tile))
    ends = [(t, min(t + step, tiles)) for t in range(0, tiles, step)]
    return [_Chunk(a * tile, min(b * tile, vocabulary), a, b) for a, b in ends], tile


class _Sweep:
    """Some positions' buffers, the two matmuls of a chunk, and the sum of the second ones over the chunks."""

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, cap: float, sides: int) -> None:
        rows, self.d = hidden.shape
        self.rows, self.head, self.bias = rows, head, bias
        self.chunks, tile = chunks_of(rows, len(head), sides)
        self.tiles = self.chunks[-1].tile_end
        self.logits = [hidden.new_empty(rows, self.chunks[0].padded) for _ in range(sides)]
        self.stride = self.chunks[0].padded
        self.part = hidden.new_empty(rows, self.d)
        # What the chunks add up to; of a single one nothing has to be kept.
        self.acc = hidden.new_empty(rows, self.d, dtype=torch.float32) if len(self.chunks) > 1 else None
        self.partials = hidden.new_empty((2, 5)[sides - 1], rows, self.tiles, dtype=torch.float32)
        self.scaling = (scale, cap)
        block = min(1024, triton.next_power_of_2(self.d))
        self.over_hidden = (rows, triton.cdiv(self.d, block))
        common = {"num_stages": 1}
        self.on_logits = {"CAPPED": cap != 0, "BV": tile, "num_warps": 8 if tile > 1024 else 4, **common}
        self.on_hidden = {"BD": block, "TILES": triton.next_power_of_2(self.tiles), "num_warps": 4, **common}
        self.summed = 0  # chunks that `acc` holds

    def over_logits(self, chunk: _Chunk) -> tuple[int, int]:
        return self.rows, chunk.tile_end - chunk.tile_0

    def multiply(self, hidden: Tensor, chunk: _Chunk, side: int = 0) -> None:
        """The chunk's logits before scale and cap, as F.linear makes them."""
        into, head = self.logits[side][:, : chunk.width], self.head[chunk.first : chunk.end]
        if self.bias is None:
            torch.mm(hidden, head.T, out=into)
        else:
            torch.addmm(self.bias[chunk.first : chunk.end], hidden, head.T, out=into)

    def project(self, chunk: _Chunk) -> None:
        """What has taken the place of the chunk's logits, times the head: the chunk's part of the gradient."""
        torch.mm(self.logits[0][:, : chunk.width], self.head[chunk.first : chunk.end], out=self.part)

    def add(self, chunk: _Chunk, rescaled: bool) -> None:
        """Adds the chunk's part to those before."""
        edit_loss_add_fwd_kernel[self.over_hidden](
            self.part, self.acc, self.partials, self.d, chunk.tile_0, chunk.tile_end, self.tiles,
            KEPT=self.summed > 0, RESCALED=rescaled, **self.on_hidden,
        )  # fmt: skip
        self.summed += 1


def _cross_entropy(sweep: _Sweep, hidden: Tensor, targets: Tensor, weights: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """One sweep, two matmuls a chunk. The target is kept out of all sums, and its own term added at the end."""
    target_logits = torch.full_like(weights, torch.nan)  # and so are loss and gradient where no token is the target
    scale, cap = sweep.scaling
    for chunk in sweep.chunks:
        sweep.multiply(hidden, chunk)
        (logits,), numbers = sweep.logits, (chunk.first, chunk.width, chunk.padded)
        edit_loss_ce_stats_fwd_kernel[sweep.over_logits(chunk)](
            logits, targets, target_logits, sweep.partials, sweep.stride, *numbers, chunk.tile_0, sweep.tiles,
            *sweep.scaling, **sweep.on_logits,
        )  # fmt: skip
        edit_loss_ce_probs_fwd_kernel[sweep.over_logits(chunk)](
            logits, targets, sweep.partials, sweep.stride, *numbers, chunk.tile_end, sweep.tiles, *sweep.scaling,
            TILES=sweep.on_hidden["TILES"], **sweep.on_logits,
        )  # fmt: skip
        sweep.project(chunk)
        if chunk is not sweep.chunks[-1]:
            sweep.add(chunk, rescaled=True)
    losses, grad = out
    edit_loss_ce_last_fwd_kernel[sweep.over_hidden](
        sweep.part, sweep.acc, sweep.partials, sweep.head, targets, target_logits, weights, losses, grad, sweep.d,
        *sweep.head.stride(), *grad.stride(), chunk.tile_0, sweep.tiles, len(sweep.head), scale, cap,
        CAPPED=cap != 0, KEPT=sweep.summed > 0, **sweep.on_hidden,
    )  # fmt: skip


def _divergence(sweep: _Sweep, hidden: Tensor, base: Tensor, weights: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Two sweeps, the second one backwards: it begins with the logits that the first one has left."""
    logits, base_logits = sweep.logits
    for chunk in sweep.chunks:
        sweep.multiply(hidden, chunk)
        sweep.multiply(base, chunk, side=1)
        edit_loss_kl_stats_fwd_kernel[sweep.over_logits(chunk)](
            logits, base_logits, sweep.partials, sweep.stride, chunk.width, chunk.padded, chunk.tile_0, sweep.tiles,
            *sweep.scaling, **sweep.on_logits,
        )  # fmt: skip
    for chunk in reversed(sweep.chunks):
        if chunk is not sweep.chunks[-1]:
            sweep.multiply(hidden, chunk)
            sweep.multiply(base, chunk, side=1)
        edit_loss_kl_diff_fwd_kernel[sweep.over_logits(chunk)](
            logits, base_logits, sweep.partials, sweep.stride, chunk.width, chunk.padded, sweep.tiles, *sweep.scaling,
            TILES=sweep.on_hidden["TILES"], **sweep.on_logits,
        )  # fmt: skip
        sweep.project(chunk)
        if chunk is not sweep.chunks[0]:
            sweep.add(chunk, rescaled=False)
    losses, grad = out
    edit_loss_kl_last_fwd_kernel[sweep.over_hidden](
        sweep.part, sweep.acc, sweep.partials, weights, losses, grad, sweep.d, *grad.stride(), sweep.tiles,
        sweep.scaling[0], KEPT=sweep.summed > 0, **sweep.on_hidden,
    )  # fmt: skip


@torch.no_grad()
def edit_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    base_hidden: Tensor | None,
    weights: Tensor,
    scale: float,
    soft_cap: float,
) -> tuple[Tensor, Tensor]:
    """As `reference`, of at most LOGITS logits at a time. A target that is no token makes loss and gradient NaN.

    Raises:
        InputError: an argument is not as described.
    """
    check_arguments(hidden, head, bias, targets, base_hidden, weights, soft_cap)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    grad = torch.empty_like(hidden)
    for start in range(0, len(hidden), ROWS):
        part = slice(start, start + ROWS)
        rows, of_rows, out = hidden[part], weights[part].contiguous(), (losses[part], grad[part])
        sweep = _Sweep(rows, head, bias, scale, soft_cap, 1 if base_hidden is None else 2)
        if targets is not None:
            _cross_entropy(sweep, rows, targets[part].contiguous(), of_rows, out)
        elif base_hidden is not None:
            _divergence(sweep, rows, base_hidden[part], of_rows, out)
    return losses, grad
