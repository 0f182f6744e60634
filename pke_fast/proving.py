"""What tests and benchmarks prove kernels with: accuracy relative to torch's own, and outputs that come poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TIMES = 3  # how many times torch's own error at the same dtype ours may be
FLOOR = 2e-7  # of the truth's norm: where torch happens to be exact, an fp32 rounding or two are still no fault


def assert_as_accurate(ours: Tensor, torchs: Tensor, truth: Tensor, name: str = "result") -> None:
    """Asserts that our error against the truth is at most 3 times torch's own at the same dtype.

    Both in the Frobenius norm over everything and in the largest error of one element.

    Args:
        ours, torchs: what is proven and what plain torch computes in the same dtype, same shape.
        truth: the same in fp32 or, better, in fp64.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, expected {list(truth.shape)}"
    wanted = truth.double().cpu()
    errors = [(result.double().cpu() - wanted).abs() for result in (ours, torchs)]
    if wanted.numel() == 0:
        return
    assert torch.isfinite(errors[0]).all(), f"{name}: {int((~errors[0].isfinite()).sum())} elements are not finite"
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        "norm": torch.linalg.vector_norm,
        "largest": lambda x: x.abs().max(),
    }
    for measure, of in measures.items():
        mine, theirs, size = (float(of(x)) for x in (*errors, wanted))
        assert mine <= TIMES * theirs + FLOOR * size, (
            f"{name}: {measure} error {mine:.3g}, more than {TIMES} times torch's {theirs:.3g} (truth: {size:.3g})"
        )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """While it lasts, new uninitialised tensors are full of NaN, or of a sentinel where they hold integers."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool or tensor.is_meta:
                return tensor
            worst = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min + 12345 % 128
            return tensor.fill_(worst)

        return made

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poisoned(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield
