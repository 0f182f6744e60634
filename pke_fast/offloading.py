"""A model in the host's memory that works on a device with less of it: layers come when they are used, ahead of it.

The lowest layers stay with the host, in pinned memory or in their mapped file; two slots on the device hold the layer
in use and the next one, which a thread copies on a stream of its own meanwhile. All else is copied to the device once.
In the end the model is as it was, with what was written to its weights. Device and host may be one and the same: then
nothing is pinned, streams are left out, and the rest is as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pke_fast.errors import InputError
from pke_fast.placement import BROUGHT, is_spread
from pke_fast.structure import replaced_forward

ALIGNMENT = 256  # bytes, of each weight in a slot, as torch's own allocations have it on a GPU


@dataclass(eq=False)
class _Part:
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
class _Layer:
    """A layer that is brought: its weights, the bytes that it takes in a slot, and its pinned buffer, if it has one."""

    parts: list[_Part]
    size: int
    flat: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer:
        parts, size = [], 0
        for owner in layer.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    parts.append(_Part(owner, name, parameter, parameter, size))
                    size += -(-parameter.numel() * parameter.element_size() // ALIGNMENT) * ALIGNMENT
        return cls(parts, size)

    def pin(self, device: torch.device) -> None:
        """Moves its weights' home to one buffer, pinned where that helps."""
        self.flat = torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for part in self.parts:
            part.home = _frozen(part.within(self.flat).copy_(part.own))

    def version(self) -> tuple[int, ...]:
        """Changes with every write to a weight."""
        return tuple(part.home._version for part in self.parts)

    def copy_into(self, flat: Tensor) -> None:
        for part in self.parts:
            part.within(flat).copy_(part.home)

    def enter(self, flat: Tensor) -> None:
        """The layer computes with what a buffer holds."""
        for part in self.parts:
            part.owner._parameters[part.name] = _frozen(part.within(flat))

    def leave(self) -> None:
        """Its weights are where they live again."""
        for part in self.parts:
            part.owner._parameters[part.name] = part.home


class Staging:
    """Two slots on a device, and the layers that take turns in them.

    Attributes:
        device: where they are used.
        copies: how many layers were brought so far.
    """

    def __init__(self, layers: Sequence[_Layer], device: torch.device) -> None:
        self._layers, self.execution_device = layers, device
        size = max(layer.size for layer in layers)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[tuple[int, tuple[int, ...]] | None] = [None, None]  # which layer, as of which version
        self._coming: list[Future[Any] | None] = [None, None]
        self._used = 1  # the slot that was used last
        self._down_to: int | None = None  # on the way back, the last layer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pke_fast-staging")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        arrived = coming.result() if coming is not None else None
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
                self._bounce = torch.empty(len(slot), dtype=torch.uint8, pin_memory=True)
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


@contextmanager
def brought_to(
    model: nn.Module, layers: nn.ModuleList, device: torch.device, lowest: int = 0, pinned: int = 0
) -> Iterator[Staging | None]:
    """For the length of a block a model in the host's memory works on a device; then it is as before, as written to.

    Args:
        layers: its decoder layers.
        lowest: so many of the lowest stay with the host, and are brought when they are used.
        pinned: so many of those, the uppermost, wait in pinned memory, the others where they are.

    Raises:
        InputError: the model is spread already, or the host has no memory to pin.
    """
    if is_spread(model):
        raise InputError(
            "the model is spread already", expected="a model in the host's memory", do="leave out its device_map"
        )
    depths = list(layers)[:lowest]
    staged = [_Layer.of(layer) for layer in depths]
    apart = {id(module) for layer in depths for module in layer.modules()}
    copies = _Copies(device)
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(_put_back, module, dict(module._parameters), dict(module._buffers))
        stack.callback(copies.write_back)
        for module in model.modules():
            copies.take(module, weights=id(module) not in apart)
        if not lowest:
            yield None
            return
        for layer in staged[lowest - pinned :]:
            copies.pin(layer)
        for layer in staged:
            layer.leave()
        staging = Staging(staged, device)
        stack.callback(staging.close)
        for index, module in enumerate(depths):
            stack.enter_context(_brought_when_called(module, staging, index))
        yield staging


class _Copies:
    """The weights' copies on the device and in pinned memory, and the way back to the model's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: dict[int, nn.Parameter] = {}  # of tied weights there is one copy
        self._made: list[tuple[nn.Parameter, nn.Parameter, int]] = []  # own, copy, the copy's version

    def take(self, module: nn.Module, *, weights: bool) -> None:
        """Brings what a module itself has to the device: its buffers, and its weights unless they come when used."""
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(self._device)
        for name, own in module._parameters.items() if weights else ():
            if own is None or own.device == self._device:
                continue
            if id(own) not in self._of:
                self._of[id(own)] = _frozen(own.detach().to(self._device))
                self._keep(own, self._of[id(own)])
            module._parameters[name] = self._of[id(own)]

    def pin(self, layer: _Layer) -> None:
        try:
            layer.pin(self._device)
        except RuntimeError as error:
            raise InputError(
                "the host has no memory to pin for a layer that is offloaded",
                expected=f"{layer.size / 2**20:.0f} MiB",
                got=str(error).splitlines()[0],
                do="raise --memory-budget, or close what else uses the host's memory",
            ) from error
        for part in layer.parts:
            self._keep(part.own, part.home)

    def _keep(self, own: nn.Parameter, copy: nn.Parameter) -> None:
        self._made.append((own, copy, copy._version))

    @torch.no_grad()
    def write_back(self) -> None:
        """The model's own weights get what was written to their copies, bit for bit."""
        for own, copy, version in self._made:
            if copy._version != version:
                now = copy.to(own.device)
                if not torch.equal(_bits(own), _bits(now)):
                    own.copy_(now)


def _bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().view(torch.uint8)


def _put_back(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    module._parameters.update(parameters)
    module._buffers.update(buffers)


@contextmanager
def _brought_when_called(layer: nn.Module, staging: Staging, index: int) -> Iterator[None]:
    own: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            staging.use(index)
            return own(*args, **kwargs)
        finally:
            staging.leave(index)

    setattr(layer, BROUGHT, staging)
    try:
        with replaced_forward(layer, forward):
            yield
    finally:
        delattr(layer, BROUGHT)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
