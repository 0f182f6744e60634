"""select_hotspots in C++ for tensors in CPU memory (csrc/select_hotspots.cpp), in CUDA for those on a GPU (.cu)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pke_fast.errors import InputError, PKEError
from pke_fast.kernels.select_hotspots import Selected, check, fp32
from pke_fast.native import dtype_of, library


def select_hotspots(
    scores: Tensor,
    k: int,
    first: int,
    end: int,
    per_layer_cap: int = 0,
    exclude: Tensor | None = None,
    minimum: float = -math.inf,
) -> Selected:
    """As `pke_fast.kernels.select_hotspots.reference`: on one core in C++, or on the current stream in CUDA.

    On a GPU the scores are read as they are, bf16 and fp16 too; the call waits for the device once, at the end, to
    learn how many were chosen.

    Raises:
        InputError: an argument is not as `reference` describes it, or on a device that is neither CPU nor CUDA.
        PKEError: the compiled part is missing, or has no CUDA.
    """
    layer_ptr, neurons, nan_count = unread(scores, k, first, end, per_layer_cap, exclude, minimum)
    chosen = int(layer_ptr.flatten()[-1]) if layer_ptr.numel() else 0
    return Selected(layer_ptr, neurons if chosen == len(neurons) else neurons[:chosen].clone(), nan_count)


def unread(
    scores: Tensor,
    k: int,
    first: int,
    end: int,
    per_layer_cap: int = 0,
    exclude: Tensor | None = None,
    minimum: float = -math.inf,
) -> Selected:
    """The same without waiting for a GPU: `neurons` has room for k (R * k); what is behind the last one is undefined.

    Raises:
        InputError, PKEError: as for `select_hotspots`.
    """
    check(scores, k, first, end, per_layer_cap, exclude, minimum)
    device = scores.device
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            "select_hotspots: scores for the compiled form",
            expected="a tensor on a CPU or a CUDA device",
            got=str(device),
            do="use .cpu()",
        )
    native = library()
    if device.type == "cuda" and not native.cuda_architectures:
        raise PKEError(
            "select_hotspots: the scores are on a GPU, but pke_fast was built without CUDA",
            expected="CPU tensors, or a build with CUDA",
            got=str(device),
            do="install pke_fast again with nvcc on PATH and PKE_FAST_CUDA=1, use .cpu(), or set"
            " PKE_FAST_BACKEND=reference",
        )
    values = scores.detach()
    values = values.contiguous() if device.type == "cuda" else values.float().contiguous()
    mask = None if exclude is None else exclude.contiguous()
    rows, (depth, width) = scores.shape[:-2], scores.shape[-2:]
    layer_ptr = torch.empty(*rows, depth + 1, dtype=torch.int64, device=device)
    neurons = torch.empty(rows.numel() * k, dtype=torch.int64, device=device)
    nan_count = torch.empty(rows, dtype=torch.int64, device=device)
    query = native.HotspotQuery(
        scores=values.data_ptr(),
        rows=rows.numel(),
        layers=depth,
        neurons=width,
        k=k,
        first=first,
        end=end,
        layer_cap=per_layer_cap,
        exclude=0 if mask is None else mask.data_ptr(),
        minimum=fp32(minimum),
    )
    result = native.HotspotResult(
        layer_ptr=layer_ptr.data_ptr(), neurons=neurons.data_ptr(), nan_counts=nan_count.data_ptr()
    )
    if device.type == "cpu":
        native.select_hotspots(query, result)
    else:
        scratch = torch.empty(native.hotspot_scratch_size(query), dtype=torch.uint8, device=device)
        dtype = dtype_of(values)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            native.select_hotspots_cuda(query, dtype, result, scratch.data_ptr(), stream)
    return Selected(layer_ptr, neurons, nan_count)
