"""Tensors that say they are on cuda:0, and lie in the host's memory: part of `pretended_gpu`.

To C++ they are CPU tensors, so that autograd and torch's choice of kernels work without a card. What Python asks of
them goes through `Moves`, every operation through `OnCard.__torch_dispatch__`, and what is made without tensors through
`Made`. What changes a tensor's shape in place isn't seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pke_fast import ops

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
OURS = "/pke_fast/", "/kernels/"

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_COPYING = (_aten.copy_.default, _aten._to_copy.default)
_SIZE = "a size depends on values"
_COPIED = "a tensor is copied from one to the other"  # unless that is asked for without waiting
_WAITING = {
    _aten._local_scalar_dense.default: "a number is read",
    _aten.equal.default: "a number is read",
    _aten.nonzero.default: _SIZE,
    _aten.masked_select.default: _SIZE,
    _aten._unique2.default: _SIZE,
    _aten.repeat_interleave.Tensor: _SIZE,
}


class Waits(list[str]):
    """Where the host has waited for the card: why, and the file and line of this package that made it."""

    def add(self, why: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back and not any(folder in frame.f_code.co_filename for folder in OURS):
            frame = frame.f_back
        self.append(f"{why}: {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")


waits = Waits()


class OnCard(Tensor):
    """`here` is the tensor that it lies in."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=HOST
        )
        made.here = here
        return made

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _same_device(func, args, kwargs)
        if func in _WAITING:
            waits.add(_WAITING[func])
        for index in args[1] if func in _INDEXING else ():
            if index is not None and (index.dtype == torch.bool or not isinstance(index, OnCard)):
                waits.add(_SIZE if index.dtype == torch.bool else _COPIED)
        result = func(*lie_in(args), **lie_in(kwargs))
        written = _tensors((args, kwargs)) if func._schema.is_mutable else []
        known = {id(x.here): x for x in written if isinstance(x, OnCard)}

        def on_card(x: Any) -> Any:
            return known[id(x)] if id(x) in known else OnCard(x) if isinstance(x, Tensor) else x

        return _each(result, on_card)


def _each(x: Any, change: Callable[[Any], Any]) -> Any:
    """What an operation takes or gives, with each of its parts changed."""
    if isinstance(x, (list, tuple)):
        return type(x)([_each(part, change) for part in x])
    if isinstance(x, dict):
        return {name: _each(part, change) for name, part in x.items()}
    return change(x)


def lie_in(x: Any) -> Any:
    """What an operation takes, with the host's tensors that the card's lie in."""
    return _each(x, lambda part: part.here if isinstance(part, OnCard) else part)


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(x, lambda part: found.append(part) if isinstance(part, Tensor) else None)
    return found


def _same_device(func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """As torch refuses it: a tensor of the host meets the card's. It may be a number, copied, or an index."""
    if func in _COPYING:
        return
    given = _tensors((args[:1], args[2:]) if func in _INDEXING else (args, kwargs))
    if any(x.dim() and not isinstance(x, OnCard) for x in given):
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in given)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {shapes}")


class _ToCard(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return OnCard(x.detach().clone())

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return lie_in(grad).clone()


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return lie_in(x.detach()).clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return OnCard(grad.clone())


def is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Moves(TorchFunctionMode):
    """What Python asks for: moves between the devices, tensors made on one of them, numbers, this package's ops."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # torch asks for it, on the way back
            return func(*args, **kwargs)
        first, name = args[0] if args else None, getattr(func, "__name__", "")
        if name in ops.OPS and not isinstance(first, FakeTensor):  # a rehearsal's has no values
            return _op(name, args, kwargs)
        if isinstance(first, OnCard):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
            if func is Tensor.tolist:
                waits.add("numbers are read")
                return first.here.tolist()
            if func in (Tensor.data_ptr, Tensor.untyped_storage):
                return func(first.here)
        if func is Tensor.to:
            return _to(first, args[1:], kwargs)
        if func is Tensor.cpu:
            return _moved(first, HOST)
        if func is Tensor.cuda:
            return _moved(first, CARD)
        if func is Tensor.pin_memory:
            return first
        if func is Tensor.copy_ and isinstance(args[1], OnCard) != isinstance(first, OnCard):
            if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                waits.add(_COPIED)
            lie_in(first).copy_(lie_in(args[1]))
            return first
        if kwargs.get("device") is not None:
            return _made(func, args, kwargs)
        return func(*args, **kwargs)


def _op(name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One of this package's operations, in the form that it has on a card."""
    with Made(), Moves():
        result = ops.implementation(name, ops.chosen_backend(name, *args))(*args, **kwargs)
    for index in ops.OPS[name].written:
        torch.autograd.graph.increment_version(args[index])
    return result


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A tensor that is asked for on a device."""
    device, drawn_by = kwargs.pop("device"), kwargs.get("generator")
    if drawn_by is not None and is_card(drawn_by.device) != is_card(device):
        raise RuntimeError(f"Expected a {device} generator but found {drawn_by.device}")
    pinned = kwargs.pop("pin_memory", False)
    assert not (pinned and is_card(device)), "only the host's memory can be pinned"
    args, kwargs = lie_in((args, kwargs))
    if not is_card(device):
        return func(*args, **kwargs, device=device)
    if func in (torch.tensor, torch.as_tensor):
        waits.add(_COPIED)
    learns = kwargs.pop("requires_grad", False)
    return OnCard(func(*args, **kwargs)).requires_grad_(learns)


def _to(x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`Tensor.to` in all of its forms."""
    device, dtype, flags = kwargs.pop("device", None), kwargs.pop("dtype", None), ["non_blocking", "copy"]
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            kwargs[flags.pop(0)] = value
        elif value is not None:
            device = value
    if device is not None:
        x = _moved(x, torch.device(device), kwargs.get("non_blocking", False))
    return x.to(dtype or x.dtype, **kwargs)


def _moved(x: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    if is_card(device) == isinstance(x, OnCard):
        return x if is_card(device) or device == HOST else x.to(device=str(device))
    if not non_blocking:
        waits.add(_COPIED)
    if is_card(device):
        return _ToCard.apply(x)
    return _moved(_ToHost.apply(x), device)


class Made(TorchDispatchMode):
    """Tensors that C++ makes on the card, and pinned ones, for which there is no allocator without a card."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if is_card(kwargs.get("device")):
            return OnCard(func(*lie_in(args), **lie_in(kwargs | {"device": HOST})))
        return func(*args, **kwargs)
