"""column_grad_norm on the CPU: torch makes the Gram matrices, C++ (csrc/column_grad_norm.cpp) the quadratic forms."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pke_fast.kernels.checks import require, spans_within, with_dense_rows
from pke_fast.kernels.column_grad_norm import OP, check_arguments, check_longest, gram_is_cheaper
from pke_fast.native import dtype_of, library

BLOCK_ELEMENTS = 1 << 20  # of an intermediate, fp32: 4 MiB, which stay in the caches


def column_grad_norm(grad_out: Tensor, h: Tensor, offsets: Tensor, longest: int | None = None) -> Tensor:
    """As `reference`, for tensors in CPU memory.

    Raises:
        InputError: an argument is not as `reference` describes it, not fp32, bf16 or fp16, or not on the CPU.
        PKEError: the compiled part is missing.
    """
    check_arguments(grad_out, h, offsets, longest)
    require(h.device.type == "cpu", OP, "h for the C++ form", "a CPU tensor", h.device)
    bounds = spans_within(OP, offsets, len(h))
    check_longest(bounds, longest)
    grad_out, h = grad_out.detach(), with_dense_rows(h.detach())
    norms = torch.zeros(len(bounds) - 1, h.shape[1])
    group: list[tuple[int, int, int]] = []  # requests by the Gram form whose matrices are made before they are used
    room = BLOCK_ELEMENTS
    for r, (a, b) in enumerate(pairwise(bounds)):
        if b == a:
            continue
        if not gram_is_cheaper(b - a, grad_out.shape[1], h.shape[1]):
            _by_product(grad_out[a:b], h[a:b], norms[r])
            continue
        if (b - a) ** 2 > room and group:
            _by_gram(grad_out, h, group, norms)
            group, room = [], BLOCK_ELEMENTS
        group.append((r, a, b))
        room -= (b - a) ** 2
    if group:
        _by_gram(grad_out, h, group, norms)
    return norms


def _by_gram(grad_out: Tensor, h: Tensor, group: list[tuple[int, int, int]], norms: Tensor) -> None:
    """sqrt(h_i^T (G G^T) h_i) for requests (row of norms, first token, end)."""
    grams = [_gram(grad_out[a:b]) for _, a, b in group]
    requests = [(a, b - a, gram.data_ptr(), norms[r].data_ptr()) for (r, a, b), gram in zip(group, grams, strict=True)]
    library().gram_norms(
        requests=requests,
        h=h.data_ptr(),
        stride=h.stride(0),
        type=dtype_of(h),
        neurons=h.shape[1],
        threads=torch.get_num_threads(),
    )


def _gram(g: Tensor) -> Tensor:
    """G G^T in fp32 for G [tokens, d], halves widened a part of d at a time."""
    if g.dtype == torch.float32:
        return g @ g.T
    step = max(64, BLOCK_ELEMENTS // len(g))
    gram = torch.zeros(len(g), len(g))
    for part in g.split(step, 1):
        wide = part.float()
        gram.addmm_(wide, wide.T)
    return gram


def _by_product(g: Tensor, h: Tensor, norms: Tensor) -> None:
    """||G^T h_i|| of one request, into norms [D]: G^T H for some neurons at a time."""
    g = g.float().T
    step = max(64, BLOCK_ELEMENTS // max(1, len(g)))
    memory = torch.empty(len(g) * min(step, h.shape[1]))
    for start in range(0, h.shape[1], step):
        part = h[:, start : start + step].float()
        into = memory[: len(g) * part.shape[1]].view(len(g), -1)
        torch.mm(g, part, out=into)
        library().column_norms(
            product=into.data_ptr(),
            rows=into.shape[0],
            columns=into.shape[1],
            norms=norms[start:].data_ptr(),
            threads=torch.get_num_threads(),
        )
