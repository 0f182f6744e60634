"""The cases of the ops that score: glu_score_fwd, glu_score_bwd, column_grad_norm, select_hotspots."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from gpu_cases import COMPILE, EAGER, OURS, Case, Result, Sizes, Target, equal_spans, faster_than, normal
from gpu_cases import share_of_the_ceiling as share
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.kernels import column_grad_norm, glu_score, select_hotspots, select_hotspots_native

UNSCORED = (f"{OURS} unscored", f"{EAGER} unscored", f"{COMPILE} unscored")


def eager_fwd(gate: Tensor, up: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    h = F.silu(gate) * up
    size = h.abs().view(len(offsets) - 1, -1, h.shape[1])  # requests of equal length: one reshape reduces them all
    return h, size.mean(1, dtype=torch.float32), size.amax(1).float()


def eager_bwd(dh: Tensor, gate: Tensor, up: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    dgate = torch.ops.aten.silu_backward(dh * up, gate)
    dup = dh * F.silu(gate)
    path = (dup * up).abs().view(len(offsets) - 1, -1, dup.shape[1])
    return dgate, dup, path.sum(1, dtype=torch.float32)


def eager_fwd_unscored(gate: Tensor, up: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    return (F.silu(gate) * up,)


def eager_bwd_unscored(dh: Tensor, gate: Tensor, up: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)


def scoring_adds(of: dict[str, Result]) -> float | None:
    """Over the fastest kernel that computes the same without scores, ours or torch's."""
    plain = [result.y50 for name, result in of.items() if name in UNSCORED]
    return of[OURS].y50 / min(plain) - 1 if plain and OURS in of else None


def glu_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    ops, requests, neurons = torch.ops.pke_fast, sizes.glu_requests, sizes.neurons
    targets = (share(0.85), Target("scoring adds", scoring_adds, most=0.05, percent=True))

    def ours_fwd(gate: Tensor, up: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.glu_score_fwd(gate, up, "silu", offsets))

    def ours_bwd(dh: Tensor, gate: Tensor, up: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.glu_score_bwd(dh, gate, up, "silu", offsets))

    def make(generator: torch.Generator, tokens: int, tensors: int) -> tuple[Tensor, ...]:
        many = (normal(generator, tokens, neurons, dtype=dtype) for _ in range(tensors))
        return (*many, equal_spans(generator, requests, tokens // requests))

    for tokens in sizes.glu_tokens:
        shape = f"T={tokens} D={neurons} R={requests}"
        one, scores = tokens * neurons * dtype.itemsize, requests * neurons * 4
        yield Case(
            "glu_score_fwd",
            shape,
            dtype,
            lambda generator, tokens=tokens: make(generator, tokens, 2),
            {
                OURS: ours_fwd,
                EAGER: eager_fwd,
                COMPILE: torch.compile(eager_fwd, dynamic=False),
                UNSCORED[0]: lambda gate, up, offsets: ours_fwd(gate, up, offsets[:1])[:1],
                UNSCORED[1]: eager_fwd_unscored,
                UNSCORED[2]: torch.compile(eager_fwd_unscored, dynamic=False),
            },
            lambda gate, up, offsets: glu_score.reference_fwd(gate, up, "silu", offsets),
            bytes=3 * one + 2 * scores,
            targets=targets,
        )
        yield Case(
            "glu_score_bwd",
            shape,
            dtype,
            lambda generator, tokens=tokens: make(generator, tokens, 3),
            {
                OURS: ours_bwd,
                EAGER: eager_bwd,
                COMPILE: torch.compile(eager_bwd, dynamic=False),
                UNSCORED[0]: lambda dh, gate, up, offsets: ours_bwd(dh, gate, up, offsets[:1])[:2],
                UNSCORED[1]: eager_bwd_unscored,
                UNSCORED[2]: torch.compile(eager_bwd_unscored, dynamic=False),
            },
            lambda dh, gate, up, offsets: glu_score.reference_bwd(dh, gate, up, "silu", offsets),
            bytes=5 * one + scores,
            targets=targets,
        )


def column_grad_norm_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    hidden, neurons = sizes.hidden, sizes.neurons
    for requests, each in sizes.norm_requests:
        spans = list(pairwise(range(0, requests * each + 1, each)))  # known on the host: torch need not read them

        def eager(grad: Tensor, h: Tensor, offsets: Tensor, spans: list[tuple[int, int]] = spans) -> tuple[Tensor, ...]:
            """A product and a norm a request, as torch does them."""
            norms = [torch.linalg.vector_norm(grad[a:b].T @ h[a:b], dim=0, dtype=torch.float32) for a, b in spans]
            return (torch.stack(norms),)

        def make(generator: torch.Generator, requests: int = requests, each: int = each) -> tuple[Tensor, ...]:
            tokens = requests * each
            inputs = (normal(generator, tokens, width, dtype=dtype) for width in (hidden, neurons))
            return (*inputs, equal_spans(generator, requests, each))

        yield Case(
            "column_grad_norm",
            f"T={requests}x{each} d={hidden} D={neurons}",
            dtype,
            make,
            {
                OURS: lambda *inputs, each=each: (torch.ops.pke_fast.column_grad_norm(*inputs, each),),
                EAGER: eager,
                COMPILE: torch.compile(eager, dynamic=False),
            },
            lambda *inputs: (column_grad_norm.reference(*inputs),),
            bytes=requests * (each * (hidden + neurons) * dtype.itemsize + neurons * 4),
            # the cheaper form, and of the Gram matrix both halves, though one would do
            flops=2 * requests * each * min(each * (hidden + neurons), hidden * neurons),
            targets=(share(0.5), faster_than("times torch's speed", (EAGER, COMPILE), 3.0)) if requests == 1 else (),
        )


def select_hotspots_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    neurons = sizes.neurons

    for layers, k in sizes.scores:

        def make(generator: torch.Generator, layers: int = layers) -> tuple[Tensor, ...]:
            # products of positive heavy-tailed factors, a different scale a layer: what scores look like
            scales = torch.rand(layers, 1, generator=generator, device=generator.device)
            return ((normal(generator, layers, neurons).exp() * scales).to(dtype),)

        def ours(scores: Tensor, k: int = k) -> tuple[Tensor, ...]:
            layer_ptr, chosen, _ = torch.ops.pke_fast.select_hotspots(scores, k, 0, len(scores), 0, None, -torch.inf)
            return layer_ptr, chosen

        def unread(scores: Tensor, k: int = k) -> tuple[Tensor, ...]:
            return tuple(select_hotspots_native.unread(scores, k, 0, len(scores)))[:2]

        def topk(scores: Tensor, k: int = k, sort: bool = True) -> tuple[Tensor, ...]:
            return (scores.flatten().topk(k, sorted=sort).indices,)

        yield Case(
            "select_hotspots",
            f"L={layers} D={neurons} k={k}",
            dtype,
            make,
            {
                OURS: ours,
                f"{OURS} unread": unread,
                "topk sorted": topk,
                "topk unsorted": lambda scores, topk=topk: topk(scores, sort=False),
                f"{COMPILE} topk": torch.compile(topk, dynamic=False),
            },
            lambda scores, k=k: tuple(select_hotspots.reference(scores, k, 0, len(scores)))[:2],
            bytes=layers * neurons * dtype.itemsize + (k + layers + 1) * 8,
            exact=True,
            waits=(OURS,),  # how many were chosen is known on the host only when the card is done
            # neither side waits for the card in what is compared
            targets=(faster_than("times torch.topk's speed", ("topk sorted", "topk unsorted"), 3.0, f"{OURS} unread"),)
            if layers == sizes.scores[0][0]
            else (),
        )


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from glu_cases(sizes, torch.bfloat16)
    yield from column_grad_norm_cases(sizes, torch.bfloat16)
    yield from select_hotspots_cases(sizes, torch.float32)
