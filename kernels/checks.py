"""What the compiled forms check before they touch memory: each raises InputError, which says what was expected."""

from __future__ import annotations

from torch import Tensor

from pke_fast.errors import InputError


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
