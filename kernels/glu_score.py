"""glu_score: act(gate) * up with per-neuron activation statistics, and its backward with the activation-path score.

Shapes: T tokens, D neurons, R requests; request r owns the tokens offsets[r] .. offsets[r + 1]. Tokens outside every
request (padding) take part in the product but not in the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of rows by request. values [T, D], offsets int64 [R + 1] ascending -> [R, D] in the dtype of values."""
    sums = values.new_zeros(len(offsets) - 1, values.shape[1])
    for r, (a, b) in enumerate(spans(offsets)):
        torch.sum(values[a:b], 0, out=sums[r])
    return sums


def spans(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


def reference_fwd(gate: Tensor, up: Tensor | None, act: str, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h = act(gate) * up, or act(gate) where up is None, with its statistics.

    Args:
        gate, up: [T, D], bf16, fp16 or fp32. `gate` is what the activation acts on.
        act: a name in `ACTIVATIONS`.
        offsets: int64 [R + 1].

    Returns:
        h [T, D] in gate's dtype; mean of |h| and max of |h| by request, fp32 [R, D] each (0 for an empty request).
    """
    h = ACTIVATIONS[act](gate.float())
    if up is not None:
        h = h * up.float()
    size = h.abs()
    counts = offsets.diff().clamp(min=1).to(size.dtype)
    mean = segment_sum(size, offsets) / counts[:, None]
    peak = torch.zeros_like(mean)
    for r, (a, b) in enumerate(spans(offsets)):
        if b > a:
            peak[r] = size[a:b].amax(0)
    return h.to(gate.dtype), mean, peak


def reference_bwd(
    dh: Tensor, gate: Tensor, up: Tensor | None, act: str, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_fwd`'s h, and each neuron's activation path.

    Returns:
        dgate and dup (empty without `up`) [T, D] in their dtypes; the path sum_t |h * dh| by request, fp32 [R, D].
    """
    with torch.enable_grad():
        g = gate.detach().float().requires_grad_()
        active = ACTIVATIONS[act](g)
    grad = dh.float()
    dactive = grad if up is None else grad * up.float()
    (dgate,) = torch.autograd.grad(active, g, dactive)
    dup = gate.new_empty(0) if up is None else (grad * active.detach()).to(up.dtype)
    path = (active.detach() * dactive).abs_()  # |act * up * dh|
    return dgate.to(gate.dtype), dup, segment_sum(path, offsets)
