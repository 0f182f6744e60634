"""column_grad_norm: how long the loss's gradient is in every column of the down projection, by request.

The gradient of one request is G^T H [d, D]; its column norms come from whichever form costs fewer multiplications:
direct, T*d*D; or by the Gram matrix, ||G^T h_i||^2 = h_i^T (G G^T) h_i, T^2*(d + D).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pke_fast.kernels.checks import FLOATS, require, require_offsets, same_device

OP = "column_grad_norm"
BLOCK = 2048  # neurons at a time: the [d or T, block] product stays in cache-sized pieces and is never whole


def gram_is_cheaper(tokens: int, hidden: int, neurons: int) -> bool:
    return tokens * (hidden + neurons) < hidden * neurons


def check_arguments(grad_out: Tensor, h: Tensor, offsets: Tensor, longest: int | None) -> None:
    """Raises InputError unless the arguments are as `reference` describes them, each fp32, bf16 or fp16.

    Offsets' values are not looked at: they may lie on a GPU.
    """
    require(h.dim() == 2, OP, "h", "[tokens, neurons]", list(h.shape))
    right = grad_out.dim() == 2 and len(grad_out) == len(h)
    require(right, OP, "grad_out", f"[{len(h)}, hidden size]", list(grad_out.shape))
    for name, tensor in (("grad_out", grad_out), ("h", h)):
        require(tensor.dtype in FLOATS, OP, name, "fp32, bf16 or fp16", tensor.dtype)
    require_offsets(OP, offsets)
    require(longest is None or longest >= 0, OP, "longest", "0 or more tokens", longest)
    same_device(OP, grad_out=grad_out, h=h, offsets=offsets)


def check_longest(bounds: list[int], longest: int | None) -> None:
    """Raises InputError where a request is longer than was said; for forms that have the offsets on the host."""
    most = max((b - a for a, b in pairwise(bounds)), default=0)
    require(longest is None or most <= longest, OP, "longest", f"{most} or more tokens", longest)


def reference(grad_out: Tensor, h: Tensor, offsets: Tensor, longest: int | None = None) -> Tensor:
    """Norms ||G_r^T h_i||_2 for every request r and neuron i.

    Args:
        grad_out: G = dL/d(down projection's output) [T, d], any float dtype.
        h: the down projection's input [T, D].
        offsets: int64 [R + 1]; request r owns the tokens offsets[r] .. offsets[r + 1].
        longest: no request has more tokens, so that a GPU needs no scratch for longer ones; None: T.

    Returns:
        fp32 [R, D]; 0 for an empty request.
    """
    bounds = offsets.tolist()
    check_longest(bounds, longest)
    norms = h.new_zeros(len(bounds) - 1, h.shape[1], dtype=torch.float32)
    for r, (a, b) in enumerate(pairwise(bounds)):
        if b == a:
            continue
        g = grad_out[a:b].float()
        gram = g @ g.T if gram_is_cheaper(b - a, g.shape[1], h.shape[1]) else None
        for start in range(0, h.shape[1], BLOCK):
            part = h[a:b, start : start + BLOCK].float()
            squares = (g.T @ part).square_().sum(0) if gram is None else (part * (gram @ part)).sum(0)
            norms[r, start : start + BLOCK] = squares.clamp_(min=0).sqrt_()  # rounding can make a square negative
    return norms
