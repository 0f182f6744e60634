"""What gpu_kernels.py measures. A case: an op at one shape, who computes it, what it costs at least, what is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS, EAGER, COMPILE = "ours", "eager", "compile"
Inputs = tuple[Any, ...]
Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Result:
    """What one provider took: milliseconds, the share of the card's ceiling, bytes of extra memory where known."""

    y20: float
    y50: float
    y80: float
    share: float
    peak_extra_bytes: int | None


@dataclass(frozen=True)
class Target:
    """What is asked of a case: a figure of its results, at least or at most so much."""

    words: str
    figure: Callable[[dict[str, Result]], float | None]
    least: float | None = None
    most: float | None = None
    percent: bool = False

    def verdict(self, results: dict[str, Result], judged: bool = True) -> str:
        """The figure beside what is asked; without judging, what is asked alone."""
        value = self.figure(results) if judged else None
        asked = f"at least {self._text(self.least)}" if self.least is not None else f"at most {self._text(self.most)}"
        if value is None:
            return f"{self.words}: not measured ({asked})"
        met = value >= self.least if self.least is not None else value <= (self.most or 0)
        return f"{self.words}: {self._text(value)} ({asked}): {'met' if met else 'MISSED'}"

    def _text(self, value: float | None) -> str:
        value = value or 0.0
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3g}"


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    Attributes:
        make: a fresh input set from a generator on the device.
        providers: who computes it; each gets an input set and returns what is compared. Some change inputs in place.
        reference: the plain fp32 form, with the same arguments and results.
        bytes, flops: least that has to be moved and, in matrix products, multiplied and added (2 a pair).
        exact: results are compared bit by bit, else by the relative rule.
        within: how far torch's own results may be from the truth, relative to it.
        waits: the providers that wait for the card, which no CUDA graph can hold.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], Inputs]
    providers: dict[str, Run]
    reference: Run
    bytes: int
    flops: int = 0
    exact: bool = False
    within: float = 0.02
    waits: tuple[str, ...] = ()
    targets: tuple[Target, ...] = field(default=())


@dataclass(frozen=True)
class Sizes:
    """The shapes; `TINY` are for trying the script where there is no GPU."""

    hidden: int = 4096
    neurons: int = 14336
    vocabulary: int = 128_256
    glu_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    glu_requests: int = 32
    norm_requests: tuple[tuple[int, int], ...] = ((1, 512), (8, 128))  # requests, tokens of each
    scores: tuple[tuple[int, int], ...] = ((32, 1_000), (400, 50_000))  # layers, k
    columns: int = 1000
    column_tokens: int = 1024
    loss_tokens: int = 1024
    copy_bytes: int = 2**31
    product: int = 8192


QUICK = Sizes(glu_tokens=(2048,), norm_requests=((1, 512),), scores=((32, 1_000),))
TINY = Sizes(
    64, 96, 320, (64,), 4, ((1, 16), (2, 8)), ((4, 20),), columns=10, column_tokens=24, loss_tokens=8,
    copy_bytes=2**16, product=64,
)  # fmt: skip


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def equal_spans(generator: torch.Generator, requests: int, tokens: int) -> Tensor:
    """Offsets of requests of equal length, which suits torch best: it reduces them by one reshape."""
    return torch.arange(0, tokens * requests + 1, tokens, device=generator.device)


def share_of_the_ceiling(least: float) -> Target:
    return Target("share of the ceiling", lambda of: of[OURS].share if OURS in of else None, least=least, percent=True)


def faster_than(words: str, rivals: tuple[str, ...], least: float, ours: str = OURS) -> Target:
    """How many times faster than the fastest of these providers."""

    def figure(of: dict[str, Result]) -> float | None:
        times = [result.y50 for name, result in of.items() if name in rivals]
        return min(times) / of[ours].y50 if times and ours in of else None

    return Target(words, figure, least=least)


def names(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
