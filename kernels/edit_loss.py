"""edit_loss: cross-entropy or KL at supervised positions, from hidden states and a frozen head, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from pke_fast.kernels import products
from pke_fast.kernels.checks import FLOATS, require, same_device

CHUNK_ELEMENTS = 1 << 21  # of a chunk's logits in fp32: 8 MiB, so [N, V] never exists
LEAST_ROWS = 32  # positions at a time, however large the vocabulary: the head is read for each chunk


def logits_of(hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """Logits in fp32: soft_cap * tanh(scale * (hidden @ head^T + bias) / soft_cap); soft_cap 0 means none."""
    logits = products.linear(hidden, head, bias).float()
    if scale != 1.0:
        logits = logits * scale
    return torch.tanh(logits / soft_cap).mul_(soft_cap) if soft_cap else logits


def reference(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    base_hidden: Tensor | None,
    weights: Tensor,
    scale: float,
    soft_cap: float,
) -> tuple[Tensor, Tensor]:
    """Loss at each position and the gradient of their weighted sum with respect to `hidden`.

    Args:
        hidden: [N, d], the head's input at the supervised positions.
        head, bias: the head's weight [V, d] and bias [V] or None; frozen, no gradient is made for them.
        targets: int64 [N]; the loss is then the cross-entropy -log p(target). None: the KL below.
        base_hidden: [N, d]; the loss is then KL(p_base || p) with p_base from these hidden states. None: targets.
        weights: fp32 [N].
        scale, soft_cap: how the model makes its logits (see `logits_of`).

    Returns:
        losses fp32 [N], unweighted; d(sum weights * losses)/d(hidden) [N, d] in hidden's dtype.
    """
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    grad = torch.empty_like(hidden)
    rows = max(LEAST_ROWS, CHUNK_ELEMENTS // head.shape[0])
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        # in place wherever it can be: three times a chunk's logits are alive at most, and once more with a soft cap
        log_base = None
        if base_hidden is not None:
            log_base = torch.log_softmax(logits_of(base_hidden[part], head, bias, scale, soft_cap), -1)
        logits = logits_of(hidden[part], head, bias, scale, soft_cap)
        log_p = torch.log_softmax(logits, -1)
        slope = scale * (1 - (logits / soft_cap).square_()) if soft_cap else scale
        del logits
        if log_base is None:
            assert targets is not None
            picked = targets[part, None]
            losses[part] = -log_p.gather(1, picked)[:, 0]
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=torch.float32))
        else:
            p_base = log_base.exp()
            losses[part] = log_base.sub_(log_p).mul_(p_base).sum(-1)
            d_logits = log_p.exp_().sub_(p_base)
            del log_base, p_base
        d_logits.mul_(weights[part, None]).mul_(slope)
        grad[part] = products.matmul(d_logits.to(head.dtype), head)
        del log_p, d_logits
    return losses, grad


def check_arguments(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    base_hidden: Tensor | None,
    weights: Tensor,
    soft_cap: float,
) -> None:
    """Raises InputError unless the arguments are as `reference` describes them."""
    op = "edit_loss"
    same_device(op, hidden=hidden, head=head, bias=bias, targets=targets, base_hidden=base_hidden, weights=weights)
    require(hidden.dim() == 2, op, "hidden", "[N, d]", list(hidden.shape))
    require(hidden.dtype in FLOATS, op, "hidden", "fp32, bf16 or fp16", hidden.dtype)
    n, d = hidden.shape
    require(head.dim() == 2 and head.shape[1] == d and len(head) > 0, op, "head", f"[V, d = {d}]", list(head.shape))
    vocabulary = len(head)
    shapes = {
        "bias": (bias, (vocabulary,)),
        "targets": (targets, (n,)),
        "base_hidden": (base_hidden, (n, d)),
        "weights": (weights, (n,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            require(tensor.shape == shape, op, name, str(list(shape)), list(tensor.shape))
    for name, tensor in {"head": head, "bias": bias, "base_hidden": base_hidden}.items():
        if tensor is not None:
            require(tensor.dtype == hidden.dtype, op, name, f"hidden's dtype, {hidden.dtype}", tensor.dtype)
    require(weights.dtype == torch.float32, op, "weights", "fp32", weights.dtype)
    one = (targets is None) != (base_hidden is None)
    require(one, op, "targets and base_hidden", "one of them", "none" if targets is None else "both")
    if targets is not None:
        require(targets.dtype == torch.int64, op, "targets", "int64", targets.dtype)
    require(soft_cap >= 0, op, "soft_cap", "a positive number, or 0 for none", soft_cap)
