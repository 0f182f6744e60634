"""What the compiled forms check before they touch memory: each raises InputError, which says what was expected."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pke_fast.errors import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    if not condition:
        raise InputError(f"{op}: {name}", expected=expected, got=str(got))


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises InputError unless all tensors that there are lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    got = ", ".join(f"{name} on {device}" for name, device in devices.items())
    require(len(set(devices.values())) <= 1, op, "tensors", "all on one device", got)


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor [.., n], copied unless the elements of a row are neighbours; rows may lie anywhere."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def require_offsets(op: str, offsets: Tensor) -> None:
    """Raises InputError unless offsets are int64 [R + 1]; their values are not looked at, they may be on a GPU."""
    right = offsets.dim() == 1 and len(offsets) >= 1 and offsets.dtype == torch.int64
    require(right, op, "offsets", "int64 [requests + 1]", f"{offsets.dtype} {list(offsets.shape)}")


def spans_within(op: str, offsets: Tensor, tokens: int) -> list[int]:
    """The offsets' values, for forms that run on the CPU; raises InputError unless they ascend within 0 .. tokens."""
    values: list[int] = offsets.tolist()
    ascending = all(a <= b for a, b in pairwise([0, *values, tokens]))
    require(ascending, op, "offsets", f"ascending within 0 .. {tokens}, the number of tokens", values)
    return values
