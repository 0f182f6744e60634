"""select_hotspots: the top k of the scores under constraints, by layer. The same input gives the same neurons.

Greater scores first; ties go to the lowest layer, then to the lowest neuron; -0 equals +0; NaN comes after everything,
-inf included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pke_fast.errors import InputError
from pke_fast.native import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # each is exact in fp32


class Selected(NamedTuple):
    """The chosen neurons in compressed rows.

    Attributes:
        layer_ptr: int64 [L + 1]; layer l has neurons[layer_ptr[l] : layer_ptr[l + 1]].
        neurons: int64 [n], ascending within a layer; n < k where the constraints leave fewer than k.
        nan_count: int64 [], NaN scores inside the window, excluded ones too.
    """

    layer_ptr: Tensor
    neurons: Tensor
    nan_count: Tensor


def reference(
    scores: Tensor,
    k: int,
    first: int,
    end: int,
    per_layer_cap: int = 0,
    exclude: Tensor | None = None,
    minimum: float = -math.inf,
) -> Selected:
    """The plain form, with stable sorts.

    Args:
        scores: [L, D], fp32, bf16 or fp16.
        k: how many to choose at most, 0 to L * D.
        first, end: the window: layers first .. end - 1.
        per_layer_cap: most of one layer; 0 for no cap.
        exclude: bool or uint8 [L, D]; neurons where it isn't zero are left alone.
        minimum: scores below it are not chosen, nor is NaN; -inf for no minimum. Rounded to fp32.

    Raises:
        InputError: an argument is not as described here.
    """
    _check(scores, k, first, end, per_layer_cap, exclude, minimum)
    depth, width = scores.shape
    values = scores.detach().float().flatten()
    layer = torch.arange(depth, device=values.device).repeat_interleave(width)

    eligible = (layer >= first) & (layer < end)
    nan_count = (values.isnan() & eligible).sum()
    if exclude is not None:
        eligible &= exclude.flatten() == 0
    least = _fp32(minimum)
    if least > -math.inf:
        eligible &= values >= least

    order = values.nan_to_num(-math.inf, math.inf, -math.inf).argsort(descending=True, stable=True)
    order = order[values.isnan()[order].int().argsort(stable=True)]
    order = order[eligible[order]]
    if per_layer_cap:
        within_cap = torch.zeros_like(order, dtype=torch.bool)
        for each in range(first, end):
            within_cap[(layer[order] == each).nonzero()[:per_layer_cap]] = True
        order = order[within_cap]
    chosen = order[:k].sort().values

    counts = torch.bincount(layer[chosen], minlength=depth)
    layer_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Selected(layer_ptr, chosen % max(width, 1), nan_count)


def native(
    scores: Tensor,
    k: int,
    first: int,
    end: int,
    per_layer_cap: int = 0,
    exclude: Tensor | None = None,
    minimum: float = -math.inf,
) -> Selected:
    """As `reference`, in C++ on one core (csrc/select_hotspots.cpp). The tensors have to be in CPU memory.

    Raises:
        InputError: an argument is not as `reference` describes it, or not on the CPU.
        PKEError: the compiled part is missing.
    """
    _check(scores, k, first, end, per_layer_cap, exclude, minimum)
    if scores.device.type != "cpu":
        raise InputError(
            "select_hotspots: scores for the C++ form", expected="a CPU tensor", got=str(scores.device), do="use .cpu()"
        )
    depth, width = scores.shape
    values = scores.detach().float().contiguous()
    mask = None if exclude is None else exclude.contiguous()
    layer_ptr = torch.empty(depth + 1, dtype=torch.int64)
    neurons = torch.empty(k, dtype=torch.int64)
    chosen, nans = library().select_hotspots(
        scores=values.data_ptr(),
        layers=depth,
        neurons=width,
        k=k,
        first=first,
        end=end,
        layer_cap=per_layer_cap,
        exclude=0 if mask is None else mask.data_ptr(),
        minimum=_fp32(minimum),
        layer_ptr=layer_ptr.data_ptr(),
        chosen_neurons=neurons.data_ptr(),
    )
    return Selected(layer_ptr, neurons[:chosen].clone(), torch.tensor(nans))


def _fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def _check(
    scores: Tensor, k: int, first: int, end: int, per_layer_cap: int, exclude: Tensor | None, minimum: float
) -> None:
    """Raises InputError unless the arguments are as `reference` describes them."""

    def require(condition: bool, name: str, expected: str, got: object) -> None:
        if not condition:
            raise InputError(f"select_hotspots: {name}", expected=expected, got=str(got))

    require(scores.dim() == 2, "scores", "[layers, neurons]", list(scores.shape))
    require(scores.dtype in DTYPES, "scores", "fp32, bf16 or fp16", scores.dtype)
    require(0 <= k <= scores.numel(), "k", f"0 to {scores.numel()}, the number of neurons", k)
    require(0 <= first <= end <= len(scores), "window", f"layers within 0 to {len(scores)}", f"[{first}, {end})")
    require(per_layer_cap >= 0, "per_layer_cap", "at least 1, or 0 for no cap", per_layer_cap)
    require(not math.isnan(minimum), "minimum", "a number, or -inf for none", minimum)
    if exclude is not None:
        require(exclude.dtype in (torch.bool, torch.uint8), "exclude", "bool or uint8", exclude.dtype)
        require(
            exclude.shape == scores.shape, "exclude", f"the scores' shape {list(scores.shape)}", list(exclude.shape)
        )
        require(exclude.device == scores.device, "exclude", f"on {scores.device}, as the scores", exclude.device)
