"""Products with weights; in half precision, on a CPU without instructions for it, in fp32 and a part of the weight at a
time.

torch multiplies bf16 and fp16 by plain loops where oneDNN finds no instructions for them, as before AVX-512: with AVX2,
4 to 340 times slower than fp32 (pytorch issue 146508). A part of the weight that is made fp32 while it is in the cache
costs next to nothing, and no copy of the whole weight is ever there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

PART_ELEMENTS = 1 << 20  # of a weight in fp32: 4 MiB

_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def without_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions by which oneDNN would multiply this dtype; False where nobody knows."""
    supported = getattr(torch.ops.mkldnn, _SUPPORTED[dtype], None) if dtype in _SUPPORTED else None
    return supported is not None and not supported()


def by_parts(weight: Tensor) -> bool:
    """Whether products with this weight are made here: it holds data of a dtype that the CPU can't multiply itself."""
    return weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter) and without_instructions(weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias [.., V], in x's dtype, of x [.., d], weight [V, d] and bias [V]; by parts without a graph."""
    if not by_parts(weight) or x.dtype != weight.dtype:
        return nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1]).float()
        out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)  # no view of another: a model may write to it
        flat = out.view(-1, len(weight))
        for part in _parts(weight):
            values = rows @ weight[part].float().T
            flat[:, part] = values if bias is None else values.add_(bias[part])
    return out


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias [.., d], in x's dtype, of x [.., V], weight [V, d] and bias [d]; by parts without a graph."""
    if not by_parts(weight) or x.dtype != weight.dtype:
        product = x @ weight
        return product if bias is None else product + bias
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        total = torch.zeros(*x.shape[:-1], weight.shape[1])
        flat = total.view(-1, weight.shape[1])
        if bias is not None:
            flat += bias
        for part in _parts(weight):
            flat.addmm_(rows[:, part].float(), weight[part].float())
    return total.to(x.dtype)


def _parts(weight: Tensor) -> Iterator[slice]:
    count = max(1, PART_ELEMENTS // weight.shape[1])
    return (slice(start, start + count) for start in range(0, len(weight), count))
