"""A GPU that isn't there, cuda:0. What it computes is computed by the CPU, its kernels by Triton's interpreter.

It shows what a CPU can't otherwise: that no tensor of the host meets one of the card's, which torch would refuse, and
where the host waits for the card. It shows nothing of streams, of memory or of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tensors_on_card import CARD, HOST, Made, Moves, OnCard, Waits, is_card, lie_in, waits
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from pke_fast import native
from pke_fast.choice import obstacle

MEMORY = 24 << 30  # bytes
_interpreted = GridExecutor.__call__
_run_backward = torch.autograd._engine_run_backward
_THE_CARD = SimpleNamespace(
    name="a pretended GPU", total_memory=MEMORY, uuid="pretended", multi_processor_count=132, L2_cache_size=1 << 20
)


class _Generator(torch.Generator):
    """Random numbers, of the host or of the card."""

    def __new__(cls, device: Any = HOST) -> _Generator:
        made = super().__new__(cls)
        made.on_card = is_card(device)
        return made

    device = property(lambda self: CARD if self.on_card else HOST)


class _Stream:
    """A stream or an event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None:
        waits.add("a stream is waited for")

    def elapsed_time(self, _end: Any) -> float:
        return 1.0  # milliseconds


_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_sleep": lambda _cycles: None,
    "get_device_name": lambda _device=None: _THE_CARD.name,
    "get_device_capability": lambda _device=None: (9, 0),
    "get_device_properties": lambda _device=None: _THE_CARD,
    "mem_get_info": lambda _device=None: (MEMORY, MEMORY),
    "memory_allocated": lambda _device=None: 0,
    "memory_reserved": lambda _device=None: 0,
    "max_memory_allocated": lambda _device=None: 0,
    "reset_peak_memory_stats": lambda _device=None: None,
    "get_per_process_memory_fraction": lambda _device=None: 1.0,
    "set_per_process_memory_fraction": lambda _fraction, _device=None: None,
    "empty_cache": lambda: None,
    "synchronize": lambda _device=None: waits.add("the card is waited for"),
    "current_stream": lambda _device=None: _Stream(),
    "Stream": _Stream,
    "Event": _Stream,
    "stream": lambda _stream: nullcontext(),
    "device_of": lambda _tensor: nullcontext(),
}


def _launch(executor: Any, *args: Any, **kwargs: Any) -> None:
    """A kernel of Triton's on tensors of the card."""
    given = (*args, *kwargs.values())
    if any(isinstance(x, Tensor) and not isinstance(x, OnCard) for x in given):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    _interpreted(executor, *lie_in(args), **lie_in(kwargs))


def _backward(*args: Any, **kwargs: Any) -> Any:
    """The way back, on which hooks are Python too."""
    with Moves():
        return _run_backward(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[Waits]:
    """While it lasts there is a GPU.

    Returns:
        where the host has waited for it.
    """
    waits.clear()
    obstacle.cache_clear()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # no tensor becomes one of another kind
    try:
        with (
            mock.patch.multiple(torch.cuda, create=True, **_CUDA),
            mock.patch.object(torch, "Generator", _Generator),
            mock.patch.object(torch.autograd, "_engine_run_backward", _backward),
            mock.patch.object(GridExecutor, "__call__", _launch),
            mock.patch.object(native, "cuda_architectures", list),  # compiled code would be given the host's addresses
            Made(),
            Moves(),
        ):
            yield waits
    finally:
        obstacle.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
