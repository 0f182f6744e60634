"""glu_score in C++ (csrc/glu_score.cpp): one pass over the tensors, on as many threads as torch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pke_fast.kernels.checks import require, spans_within, with_dense_rows
from pke_fast.kernels.glu_score import ACTIVATIONS, check_arguments, halves
from pke_fast.native import dtype_of, library

ACTS = {name: number for number, name in enumerate(ACTIVATIONS)}  # in the order of csrc/activations.h


def fwd(
    gate: Tensor, up: Tensor | None, act: str, offsets: Tensor, mask: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference_fwd`, for tensors in CPU memory.

    Raises:
        InputError: an argument is not as `reference_fwd` describes it, or not on the CPU.
        PKEError: the compiled part is missing.
    """
    shape, held = _checked("glu_score_fwd", gate, up, act, offsets, mask, fused)
    first, second = _halves(gate, up, fused)
    h = torch.empty(shape["tokens"], shape["neurons"], dtype=gate.dtype)
    mean, peak = torch.empty(2, shape["requests"], shape["neurons"]).unbind()
    library().glu_score_fwd(
        **shape,
        gate=_rows(first),
        up=_rows(second),
        h=_rows(h),
        mean=mean.data_ptr(),
        peak=peak.data_ptr(),
        threads=torch.get_num_threads(),
    )
    del held
    return h, mean, peak


def bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    offsets: Tensor,
    mask: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference_bwd`, for tensors in CPU memory.

    Raises:
        InputError: an argument is not as `reference_bwd` describes it, or not on the CPU.
        PKEError: the compiled part is missing.
    """
    shape, held = _checked("glu_score_bwd", gate, up, act, offsets, mask, fused, dh)
    first, second = _halves(gate, up, fused)
    dh = with_dense_rows(dh)
    dgate = torch.empty(gate.shape, dtype=gate.dtype)
    dup = gate.new_empty(0) if up is None else torch.empty(up.shape, dtype=up.dtype)
    into_gate, into_up = halves(dgate, None if up is None else dup, fused)
    path = torch.empty(shape["requests"], shape["neurons"])
    library().glu_score_bwd(
        **shape,
        dh=_rows(dh),
        gate=_rows(first),
        up=_rows(second),
        dgate=_rows(into_gate),
        dup=_rows(into_up),
        path=path.data_ptr(),
        threads=torch.get_num_threads(),
    )
    del held
    return dgate, dup, path


def _checked(
    op: str,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    offsets: Tensor,
    mask: Tensor | None,
    fused: bool,
    dh: Tensor | None = None,
) -> tuple[dict[str, Any], tuple[Tensor | None, ...]]:
    """What both functions tell C++, and the tensors that have to live while it runs."""
    check_arguments(op, gate, up, act, offsets, mask, fused, dh)
    require(gate.device.type == "cpu", op, "gate for the C++ form", "a CPU tensor", gate.device)
    spans_within(op, offsets, len(gate))
    offsets, mask = offsets.contiguous(), None if mask is None else mask.contiguous()
    shape = {
        "type": dtype_of(gate),
        "act": ACTS[act],
        "tokens": len(gate),
        "neurons": gate.shape[1] // 2 if fused else gate.shape[1],
        "requests": len(offsets) - 1,
        "offsets": offsets.data_ptr(),
        "mask": 0 if mask is None else mask.data_ptr(),
    }
    return shape, (offsets, mask)


def _halves(gate: Tensor, up: Tensor | None, fused: bool) -> tuple[Tensor, Tensor | None]:
    """`halves` of tensors whose elements are neighbours within a row."""
    return halves(with_dense_rows(gate), None if up is None else with_dense_rows(up), fused)


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    """A tensor's address and the elements from one row to the next."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
