"""Layers that take turns in two slots of a device: the one in use, and the next one, which comes meanwhile.

A thread copies it, on a stream of its own where the device has streams. What is written to a weight at its home is
brought from then on: a slot knows the version of what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SLOTS = 2
ALIGNMENT = 256  # bytes, of each weight in a slot, as torch's own allocations have it on a GPU


@dataclass(eq=False)
class Part:
    """A weight of a layer that is brought.

    Attributes:
        owner, name: the module that has it, and its name there.
        own: the model's own parameter.
        home: where its values are meanwhile; what is written to it is brought from then on.
        offset: where it lies in a slot, in bytes.
    """

    owner: nn.Module
    name: str
    own: nn.Parameter
    home: nn.Parameter
    offset: int

    def within(self, flat: Tensor) -> Tensor:
        """Its place in a buffer that holds its layer."""
        own = self.own
        return flat[self.offset : self.offset + own.numel() * own.element_size()].view(own.dtype).view(own.shape)


@dataclass(eq=False)
class StagedLayer:
    """A layer that is brought: its weights, the bytes that it takes in a slot, and its pinned buffer, if it has one."""

    parts: list[Part]
    size: int
    flat: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> StagedLayer:
        parts, size = [], 0
        for owner in layer.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    parts.append(Part(owner, name, parameter, parameter, size))
                    size += -(-parameter.numel() * parameter.element_size() // ALIGNMENT) * ALIGNMENT
        return cls(parts, size)

    def pin(self, device: torch.device) -> None:
        """Moves its weights' home to one buffer, pinned where that helps."""
        self.flat = buffer(self.size, pinned=device.type == "cuda")
        for part in self.parts:
            part.home = frozen(part.within(self.flat).copy_(part.own))

    def version(self) -> tuple[int, ...]:
        """Changes with every write to a weight."""
        return tuple(part.home._version for part in self.parts)

    def copy_into(self, flat: Tensor) -> None:
        for part in self.parts:
            part.within(flat).copy_(part.home)

    def enter(self, flat: Tensor) -> None:
        """The layer computes with what a buffer holds."""
        for part in self.parts:
            part.owner._parameters[part.name] = frozen(part.within(flat))

    def leave(self) -> None:
        """Its weights are where they live again."""
        for part in self.parts:
            part.owner._parameters[part.name] = part.home


def staging_bytes(layers: Iterable[nn.Module]) -> int:
    """What the two slots take on the device."""
    return SLOTS * max(StagedLayer.of(layer).size for layer in layers)


class Staging:
    """Two slots on a device, and the layers that take turns in them.

    Args:
        stream: what layers are copied on; None: no streams, a copy is made when the thread says so.

    Attributes:
        execution_device: where they are used.
        copies: how many layers were brought so far.
    """

    def __init__(self, layers: Sequence[StagedLayer], device: torch.device, stream: Any = None) -> None:
        self._layers, self.execution_device, self._stream = layers, device, stream
        size = max(layer.size for layer in layers)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._held: list[tuple[int, tuple[int, ...]] | None] = [None, None]  # which layer, as of which version
        self._coming: list[Future[Any] | None] = [None, None]
        self._used = 1  # the slot that was used last
        self._down_to: int | None = None  # on the way back, the last layer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pke_fast-staging")
        self._bounce: Tensor | None = None  # pinned: what isn't goes through it
        self._bounced: Any = None  # until then it is in use
        self.copies = 0

    @contextmanager
    def downwards(self, to: int) -> Iterator[None]:
        """While it lasts the layers are used in descending order, down to this one."""
        self._down_to, before = to, self._down_to
        try:
            yield
        finally:
            self._down_to = before

    def use(self, index: int) -> None:
        """Puts a layer's weights in place, and starts to bring the next one."""
        slot = self._bring(index)
        self._used = slot
        coming, self._coming[slot] = self._coming[slot], None
        try:
            arrived = coming.result() if coming is not None else None
        except BaseException:
            self._held[slot] = None  # it isn't there
            raise
        if arrived is not None:
            torch.cuda.current_stream(self.execution_device).wait_event(arrived)
        self._layers[index].enter(self._slots[slot])
        following = index + 1 if self._down_to is None else index - 1
        if (self._down_to or 0) <= following < len(self._layers):
            self._bring(following)

    def leave(self, index: int) -> None:
        """Its weights are where they live again; a graph of it may use the slot until another layer comes there."""
        self._layers[index].leave()

    def _bring(self, index: int) -> int:
        """The slot where a layer is, or is coming to."""
        now = (index, self._layers[index].version())
        if now in self._held:
            return self._held.index(now)
        slot = next((s for s, held in enumerate(self._held) if held and held[0] == index), 1 - self._used)
        free = None
        if self._stream is not None:
            free = torch.cuda.Event()
            free.record(torch.cuda.current_stream(self.execution_device))  # whatever used the slot comes before it
        self._held[slot] = now
        self._coming[slot] = self._worker.submit(self._copy, index, self._slots[slot], free)
        self.copies += 1
        return slot

    @torch.no_grad()
    def _copy(self, index: int, slot: Tensor, free: Any) -> Any:
        """Copies a layer, in the worker's thread; an event that comes when it is there."""
        layer = self._layers[index]
        if self._stream is None:
            layer.copy_into(slot)
            return None
        source = layer.flat
        if source is None:
            if self._bounce is None:
                self._bounce = buffer(len(slot), pinned=True)
            if self._bounced is not None:
                self._bounced.synchronize()
            layer.copy_into(self._bounce)
            source = self._bounce[: layer.size]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            slot[: layer.size].copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        if layer.flat is None:
            self._bounced = arrived
        return arrived

    def close(self) -> None:
        """Ends the thread, and lets the slots go once nothing uses them."""
        self._worker.shutdown(cancel_futures=True)
        if self._stream is not None:
            torch.cuda.synchronize(self.execution_device)
        self._slots.clear()


def buffer(size: int, *, pinned: bool) -> Tensor:
    """So many bytes of the host's memory."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def frozen(values: Tensor) -> nn.Parameter:
    """A parameter that shares memory, and the count of changes, with a tensor."""
    return nn.Parameter(values, requires_grad=False)
