"""glu_score: act(gate) * up with per-neuron activation statistics, and its backward with the activation-path score.

Shapes: T tokens, D neurons, R requests; request r owns the tokens offsets[r] .. offsets[r + 1]. Tokens outside every
request and masked ones (padding) take part in the product but not in the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast.kernels.checks import FLOATS, require, require_offsets, same_device

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
    for r, (a, b) in enumerate(_spans(offsets)):
        torch.sum(values[a:b], 0, out=sums[r])
    return sums


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


def halves(gate: Tensor, up: Tensor | None, fused: bool) -> tuple[Tensor, Tensor | None]:
    """What the activation acts on and what it is multiplied by, as views; a fused [T, 2D] holds them side by side."""
    if not fused:
        return gate, up
    neurons = gate.shape[1] // 2
    return gate[:, :neurons], gate[:, neurons:]


def check_arguments(
    op: str,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    offsets: Tensor,
    mask: Tensor | None,
    fused: bool,
    dh: Tensor | None = None,
) -> None:
    """Raises InputError unless the arguments are as `reference_fwd` and `reference_bwd` describe them.

    Offsets' values are not looked at: they may lie on a GPU.
    """
    require(gate.dim() == 2, op, "gate", "[tokens, neurons]", list(gate.shape))
    require(gate.dtype in FLOATS, op, "gate", "fp32, bf16 or fp16", gate.dtype)
    require(act in ACTIVATIONS, op, "act", "one of " + ", ".join(ACTIVATIONS), act)
    tokens, width = gate.shape
    if fused:
        require(up is None, op, "fused", "no up beside the gate that holds it", "both")
        require(width % 2 == 0, op, "fused", "gate [tokens, 2 * neurons]", list(gate.shape))
        width //= 2
    for name, other in (("up", up), ("dh", dh)):
        if other is not None:
            right = list(other.shape) == [tokens, width] and other.dtype == gate.dtype
            require(right, op, name, f"{gate.dtype} {[tokens, width]}", f"{other.dtype} {list(other.shape)}")
    require_offsets(op, offsets)
    if mask is not None:
        right = list(mask.shape) == [tokens] and mask.dtype == torch.bool
        require(right, op, "mask", f"torch.bool [{tokens}]", f"{mask.dtype} {list(mask.shape)}")
    same_device(op, gate=gate, up=up, dh=dh, offsets=offsets, mask=mask)


def reference_fwd(
    gate: Tensor, up: Tensor | None, act: str, offsets: Tensor, mask: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """h = act(gate) * up, or act(gate) where there is no up, with its statistics.

    Args:
        gate, up: [T, D], bf16, fp16 or fp32. `gate` is what the activation acts on.
        act: a name in `ACTIVATIONS`.
        offsets: int64 [R + 1], ascending.
        mask: bool [T]; tokens where it is False count for nothing. None: all count.
        fused: `gate` is [T, 2D], gate's half before up's, and `up` is None (Phi-3).

    Returns:
        h [T, D] in gate's dtype; mean of |h| and max of |h| by request, fp32 [R, D] each (0 for an empty request).
    """
    gate, up = halves(gate, up, fused)
    h = ACTIVATIONS[act](gate.float())
    if up is not None:
        h = h * up.float()
    size = h.abs()
    if mask is None:
        counts = offsets.diff()
    else:
        size = size.masked_fill(~mask[:, None], 0)
        counts = torch.cat([offsets.new_zeros(1), mask.cumsum(0)])[offsets].diff()
    mean = segment_sum(size, offsets) / counts.clamp(min=1)[:, None]
    peak = torch.zeros_like(mean)
    for r, (a, b) in enumerate(_spans(offsets)):
        if b > a:
            peak[r] = size[a:b].amax(0)
    return h.to(gate.dtype), mean, peak


def reference_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    offsets: Tensor,
    mask: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_fwd`'s h, and each neuron's activation path.

    Args:
        dh: [T, D], the gradient that comes in.
        others: as for `reference_fwd`.

    Returns:
        dgate and dup in the shapes and dtypes of gate and up (dup is empty where up is None; fused, dgate is
        [T, 2D] and holds both); the path sum_t |h * dh| by request, fp32 [R, D].
    """
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = gate.new_empty(0) if up is None else torch.empty_like(up, memory_format=torch.contiguous_format)
    into_gate, into_up = halves(dgate, dup, fused)
    gate, up = halves(gate, up, fused)
    with torch.enable_grad():
        g = gate.detach().float().requires_grad_()
        active = ACTIVATIONS[act](g)
    grad = dh.float()
    dactive = grad if up is None else grad * up.float()
    into_gate.copy_(torch.autograd.grad(active, g, dactive)[0])
    if up is not None and into_up is not None:
        into_up.copy_(grad * active.detach())
    path = (active.detach() * dactive).abs_()  # |act * up * dh|
    if mask is not None:
        path.masked_fill_(~mask[:, None], 0)
    return dgate, dup, segment_sum(path, offsets)
