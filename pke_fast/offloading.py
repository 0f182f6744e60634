"""A model in the host's memory that works on a device with less of it: layers come when they are used, ahead of it.

The lowest layers stay with the host, in pinned memory or in their mapped file; two slots on the device hold the layer
in use and the next one, which a thread copies on a stream of its own meanwhile. All else is copied to the device once.
In the end the model is as it was, with what was written to its weights. Device and host may be one and the same: then
nothing is pinned, streams are left out, and the rest is as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pke_fast.errors import InputError
from pke_fast.module_calls import replaced_forward
from pke_fast.placement import BROUGHT, is_spread
from pke_fast.staging import StagedLayer, Staging, frozen


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
    staged = [StagedLayer.of(layer) for layer in depths]
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
        staging = Staging(staged, device, torch.cuda.Stream(device) if device.type == "cuda" else None)
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
                with _no_room("the device has no memory for a weight", own.nbytes):
                    self._of[id(own)] = frozen(own.detach().to(self._device))
                self._keep(own, self._of[id(own)])
            module._parameters[name] = self._of[id(own)]

    def pin(self, layer: StagedLayer) -> None:
        with _no_room("the host has no memory to pin for a layer that is offloaded", layer.size):
            layer.pin(self._device)
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


@contextmanager
def _no_room(what: str, size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            what,
            expected=f"{size / 2**20:.0f} MiB",
            got=str(error).splitlines()[0],
            do="give another --memory-budget, or close what else uses memory",
        ) from error


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
