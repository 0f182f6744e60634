"""The cases of the ops that edit: the sparse columns' gradient, update, step and write, and edit_loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_cases import COMPILE, EAGER, OURS, Case, Inputs, Result, Sizes, Target, faster_than, normal
from gpu_cases import share_of_the_ceiling as share
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.kernels import edit_loss, sparse_columns

ADAM = (3, 1e-3, 0.9, 0.999, 1e-8, 0.0, math.inf)  # step, lr, beta1, beta2, eps, no decay, no bound
SECTOR = 32  # bytes: the least that an NVIDIA card's memory reads or writes


def chosen_neurons(sizes: Sizes) -> Tensor:
    """Which columns are selected: any, ascending, the same in every input set."""
    every = torch.randperm(sizes.neurons, generator=torch.Generator().manual_seed(7))
    return every[: sizes.columns].sort().values


def bytes_written(sizes: Sizes, dtype: torch.dtype) -> int:
    """Into the weight [d, D]: the sectors with a selected element, each once. Neighbours may share one."""
    sectors = torch.unique(chosen_neurons(sizes) * dtype.itemsize // SECTOR)
    return len(sectors) * SECTOR * sizes.hidden


def eager_adam(
    weight: Tensor, neurons: Tensor, master: Tensor, moment1: Tensor, moment2: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Adam in place on a kept fp32 master, which needs no gather, and the scatter."""
    step, lr, beta1, beta2, eps, _, _ = ADAM
    moment1.lerp_(grad, 1 - beta1)
    moment2.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (moment2 / (1 - beta2**step)).sqrt_().add_(eps)
    master.addcdiv_(moment1, denominator, value=-lr / (1 - beta1**step))
    weight.index_copy_(1, neurons, master.to(weight.dtype).T)
    return weight, master, moment1, moment2


def fused_adam(
    weight: Tensor, neurons: Tensor, master: Tensor, moment1: Tensor, moment2: Tensor, grad: Tensor, step: Tensor
) -> tuple[Tensor, ...]:
    """The same with torch's fused Adam, one kernel, and the scatter."""
    _, lr, beta1, beta2, eps, _, _ = ADAM
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": 0.0, "eps": eps}
    state = ([master], [grad], [moment1], [moment2], [], [step])
    torch._fused_adamw_(*state, **numbers, amsgrad=False, maximize=False)
    weight.index_copy_(1, neurons, master.to(weight.dtype).T)
    return weight, master, moment1, moment2


def sparse_column_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    ops, hidden, count, tokens = torch.ops.pke_fast, sizes.hidden, sizes.columns, sizes.column_tokens
    shape = f"n={count} of D={sizes.neurons} d={hidden}"
    elements = count * hidden
    inputs_bytes, product = tokens * (hidden + count) * dtype.itemsize, 2 * tokens * count * hidden
    chosen = chosen_neurons(sizes)

    def activations(generator: torch.Generator) -> Inputs:
        return tuple(normal(generator, tokens, width, dtype=dtype) for width in (hidden, count))

    def state(generator: torch.Generator) -> Inputs:
        """weight, neurons, old, master and both moments."""
        weight = normal(generator, hidden, sizes.neurons, dtype=dtype, scale=0.02)
        neurons = chosen.to(generator.device)
        old = sparse_columns.read_columns(weight, 1, neurons).float()
        moments = (normal(generator, count, hidden, scale=1e-3), normal(generator, count, hidden, scale=1e-3).square())
        return weight, neurons, old, old.clone(), *moments

    def grad_into(grad_out: Tensor, h: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        return (into.add_(h.T @ grad_out),)

    def ours_grad(grad_out: Tensor, h: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        ops.sparse_column_grad(grad_out, h, into)
        return (into,)

    def reference_grad(grad_out: Tensor, h: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        sparse_columns.reference_grad(grad_out, h, into)
        return (into,)

    yield Case(
        "sparse_column_grad",
        f"T={tokens} {shape}",
        dtype,
        lambda generator: (*activations(generator), normal(generator, count, hidden)),
        {OURS: ours_grad, EAGER: grad_into, COMPILE: torch.compile(grad_into, dynamic=False)},
        reference_grad,
        bytes=inputs_bytes + 8 * elements,
        flops=product,
    )

    def ours_update(weight: Tensor, neurons: Tensor, old: Tensor, *state_grad: Tensor) -> tuple[Tensor, ...]:
        ops.sparse_column_update(weight, 1, neurons, old, *state_grad, *ADAM)
        return weight, *state_grad[:3]

    def reference_update(weight: Tensor, neurons: Tensor, old: Tensor, *state_grad: Tensor) -> tuple[Tensor, ...]:
        sparse_columns.reference_update(weight, 1, neurons, old, *state_grad, *ADAM)
        return weight, *state_grad[:3]

    def plain_update(weight: Tensor, neurons: Tensor, old: Tensor, *state_grad: Tensor) -> tuple[Tensor, ...]:
        return eager_adam(weight, neurons, *state_grad)

    def fused_update(weight: Tensor, neurons: Tensor, old: Tensor, *state_grad: Tensor) -> tuple[Tensor, ...]:
        return fused_adam(weight, neurons, *state_grad, step=torch.full((), float(ADAM[0]), device=weight.device))

    yield Case(
        "sparse_column_update",
        shape,
        dtype,
        lambda generator: (*state(generator), normal(generator, count, hidden, scale=1e-3)),
        {
            OURS: ours_update,
            EAGER: plain_update,
            f"{EAGER} fused Adam": fused_update,
            COMPILE: torch.compile(plain_update, dynamic=False),
        },
        reference_update,
        bytes=7 * 4 * elements + bytes_written(sizes, dtype),  # gradient read; master and both moments read and written
        targets=(share(0.8),),
    )

    def ours_step(weight: Tensor, neurons: Tensor, old: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        ops.sparse_column_step(weight, 1, neurons, old, *rest, *ADAM)
        return weight, *rest[:3]

    def reference_step(weight: Tensor, neurons: Tensor, old: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        sparse_columns.reference_step(weight, 1, neurons, old, *rest, *ADAM)
        return weight, *rest[:3]

    def plain_step(weight: Tensor, neurons: Tensor, old: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *kept, grad_out, h = rest
        return eager_adam(weight, neurons, *kept, (h.T @ grad_out).float())

    yield Case(
        "sparse_column_step",
        f"T={tokens} {shape}",
        dtype,
        lambda generator: (*state(generator), *activations(generator)),
        {OURS: ours_step, EAGER: plain_step, COMPILE: torch.compile(plain_step, dynamic=False)},
        reference_step,
        bytes=inputs_bytes + 6 * 4 * elements + bytes_written(sizes, dtype),
        flops=product,
    )

    def ours_write(weight: Tensor, neurons: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        ops.write_columns(weight, 1, neurons, values)
        return (weight,)

    def plain_write(weight: Tensor, neurons: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        sparse_columns.reference_write(weight, 1, neurons, values)
        return (weight,)

    yield Case(
        "write_columns",
        shape,
        dtype,
        lambda generator: (*state(generator)[:2], normal(generator, count, hidden)),
        {OURS: ours_write, EAGER: plain_write, COMPILE: torch.compile(plain_write, dynamic=False)},
        plain_write,
        bytes=4 * elements + bytes_written(sizes, dtype),
    )


def eager_loss(
    hidden: Tensor, head: Tensor, targets: Tensor | None, base: Tensor | None, weights: Tensor
) -> tuple[Tensor, ...]:
    """All logits at once, in fp32 as models give them, and autograd's gradient."""
    x = hidden.detach().requires_grad_()
    logits = F.linear(x, head).float()
    if targets is not None:
        losses = F.cross_entropy(logits, targets, reduction="none")
    else:
        assert base is not None
        log_base = torch.log_softmax(F.linear(base, head).float(), -1)
        losses = F.kl_div(torch.log_softmax(logits, -1), log_base, log_target=True, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad((losses * weights).sum(), x)
    return losses.detach(), grad


def edit_loss_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    hidden, vocabulary, tokens = sizes.hidden, sizes.vocabulary, sizes.loss_tokens

    def make(generator: torch.Generator, kl: bool) -> Inputs:
        states = normal(generator, tokens, hidden, dtype=dtype)
        head = normal(generator, vocabulary, hidden, dtype=dtype, scale=3 / math.sqrt(hidden))
        targets = torch.randint(vocabulary, (tokens,), generator=generator, device=generator.device)
        # an edit moves the states a little: the KL is small
        base = states + normal(generator, tokens, hidden, dtype=dtype, scale=0.1)
        weights = torch.rand(tokens, generator=generator, device=generator.device) / tokens
        return states, head, *((None, base) if kl else (targets, None)), weights

    def ours(
        states: Tensor, head: Tensor, targets: Tensor | None, base: Tensor | None, weights: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(torch.ops.pke_fast.edit_loss(states, head, None, targets, base, weights, 1.0, 0.0))

    def reference(
        states: Tensor, head: Tensor, targets: Tensor | None, base: Tensor | None, weights: Tensor
    ) -> tuple[Tensor, ...]:
        return edit_loss.reference(states, head, None, targets, base, weights, 1.0, 0.0)

    def share_of_memory(of: dict[str, Result]) -> float | None:
        if OURS not in of or EAGER not in of:
            return None
        mine, theirs = (of[name].peak_extra_bytes for name in (OURS, EAGER))
        return None if mine is None or not theirs else mine / theirs

    for kind in ("CE", "KL"):
        yield Case(
            "edit_loss",
            f"{kind} N={tokens} V={vocabulary} d={hidden}",
            dtype,
            lambda generator, kind=kind: make(generator, kind == "KL"),
            {
                OURS: ours,
                EAGER: eager_loss,
                f"{EAGER} chunks": reference,  # the plain form is torch too: [N, V] in chunks of 16 MiB
                COMPILE: torch.compile(eager_loss, dynamic=False),
            },
            reference,
            within=0.2 if kind == "KL" else 0.02,  # a small KL is a difference of two logits, each rounded to half
            bytes=vocabulary * hidden * dtype.itemsize + (3 if kind == "KL" else 2) * tokens * hidden * dtype.itemsize,
            flops=2 * tokens * vocabulary * hidden * (3 if kind == "KL" else 2),  # logits of each side, and gradient
            targets=(
                Target("extra memory beside torch's", share_of_memory, most=1 / 8),
                faster_than("times torch's speed", (EAGER, f"{EAGER} chunks", COMPILE), 1.0),
            ),
        )


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from sparse_column_cases(sizes, torch.bfloat16)
    yield from edit_loss_cases(sizes, torch.bfloat16)
