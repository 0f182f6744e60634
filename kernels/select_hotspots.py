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
from pke_fast.kernels.checks import FLOATS


class Selected(NamedTuple):
    """The chosen neurons in compressed rows.

    Attributes:
        layer_ptr: int64 [L + 1], or [R, L + 1] for R rows of scores; layer l (of row r) has
            neurons[layer_ptr[l] : layer_ptr[l + 1]] (layer_ptr[r, l] and so on); row r + 1 begins where row r ends.
        neurons: int64 [n], ascending within a layer; n < k (R * k) where the constraints leave fewer.
        nan_count: int64 [] or [R], NaN scores inside the window, excluded ones too.
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
        scores: [L, D], fp32, bf16 or fp16; or [R, L, D], R selections that have nothing to do with each other.
        k: how many to choose at most (of every row), 0 to L * D.
        first, end: the window: layers first .. end - 1.
        per_layer_cap: most of one layer; 0 for no cap.
        exclude: bool or uint8, the scores' shape; neurons where it isn't zero are left alone.
        minimum: scores below it are not chosen, nor is NaN; -inf for no minimum. Rounded to fp32.

    Raises:
        InputError: an argument is not as described here.
    """
    check(scores, k, first, end, per_layer_cap, exclude, minimum)
    if scores.dim() == 2:
        return _reference_of_row(scores, k, first, end, per_layer_cap, exclude, minimum)
    rows = [
        _reference_of_row(row, k, first, end, per_layer_cap, None if exclude is None else exclude[i], minimum)
        for i, row in enumerate(scores)
    ]
    layer_ptr = torch.empty(len(rows), scores.shape[1] + 1, dtype=torch.int64, device=scores.device)
    base = 0
    for i, row in enumerate(rows):
        layer_ptr[i] = row.layer_ptr + base
        base += len(row.neurons)
    nothing = layer_ptr.new_empty(0)
    return Selected(
        layer_ptr,
        torch.cat([nothing, *(row.neurons for row in rows)]),
        torch.cat([nothing, *(row.nan_count[None] for row in rows)]),
    )


def _reference_of_row(
    scores: Tensor, k: int, first: int, end: int, per_layer_cap: int, exclude: Tensor | None, minimum: float
) -> Selected:
    depth, width = scores.shape
    values = scores.detach().float().flatten()
    layer = torch.arange(depth, device=values.device).repeat_interleave(width)

    eligible = (layer >= first) & (layer < end)
    nan_count = (values.isnan() & eligible).sum()
    if exclude is not None:
        eligible &= exclude.flatten() == 0
    least = fp32(minimum)
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


def fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def check(
    scores: Tensor, k: int, first: int, end: int, per_layer_cap: int, exclude: Tensor | None, minimum: float
) -> None:
    """Raises InputError unless the arguments are as `reference` describes them."""

    def require(condition: bool, name: str, expected: str, got: object) -> None:
        if not condition:
            raise InputError(f"select_hotspots: {name}", expected=expected, got=str(got))

    require(scores.dim() in (2, 3), "scores", "[layers, neurons] or [rows, layers, neurons]", list(scores.shape))
    require(scores.dtype in FLOATS, "scores", "fp32, bf16 or fp16", scores.dtype)
    depth, width = scores.shape[-2:]
    require(0 <= k <= depth * width, "k", f"0 to {depth * width}, the number of neurons", k)
    require(0 <= first <= end <= depth, "window", f"layers within 0 to {depth}", f"[{first}, {end})")
    require(per_layer_cap >= 0, "per_layer_cap", "at least 1, or 0 for no cap", per_layer_cap)
    require(not math.isnan(minimum), "minimum", "a number, or -inf for none", minimum)
    if exclude is not None:
        require(exclude.dtype in (torch.bool, torch.uint8), "exclude", "bool or uint8", exclude.dtype)
        require(
            exclude.shape == scores.shape, "exclude", f"the scores' shape {list(scores.shape)}", list(exclude.shape)
        )
        require(exclude.device == scores.device, "exclude", f"on {scores.device}, as the scores", exclude.device)
