"""Where a module computes, and where its weights are: on their device, or taken away by accelerate until they are used.

A model that was loaded with `device_map` moves hidden states and brings weights by accelerate's hooks, which run with
every module's call. What reads or writes a weight outside of such a call asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pke_fast.errors import InputError

BROUGHT = "_pke_fast_brought"  # what `offloading` gives a layer whose weights come when it is called


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its hook brings weights and arguments, else where its first weight is."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    own = next(module.parameters(recurse=False), None)
    if own is not None:
        return own.device
    for child in module.children():
        if next(child.parameters(), None) is not None:
            return device_of(child)
    return torch.device("cpu")


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens: at its embedding, where it tells which that is."""
    return device_of(model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model)


def live_weight(module: nn.Module, name: str) -> Tensor:
    """The tensor that a parameter's values come from; what is written to it is what the model computes with.

    A weight that accelerate left on disk is brought to the host's memory, and stays there: no file is written to.

    Args:
        name: from this module on, such as "layers.3.mlp.down_proj.weight".

    Raises:
        AttributeError: there is no such parameter.
        InputError: it holds no data (meta device).
    """
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    weights, key = _away(module, name)
    if not hasattr(weights, "index"):
        return weights[key]
    if key not in weights.state_dict:  # of accelerate's OffloadedWeightsLoader; it goes before the files
        weights.state_dict[key] = weights[key].to("cpu", copy=True)
    return weights.state_dict[key]


def stored_weight(module: nn.Module, name: str) -> Tensor:
    """A parameter's values as they are, to be read alone: of one on disk, a copy that isn't kept."""
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    weights, key = _away(module, name)
    values: Tensor = weights[key]
    return values


def can_be_written(model: nn.Module, name: str) -> bool:
    """Whether `live_weight` has something to give: the parameter's values are in memory, or brought there by hooks."""
    return not model.get_parameter(name).is_meta or _weights(model, name) is not None


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter, tied ones once; those on disk are read one by one.

    Raises:
        InputError: one holds no data (meta device).
    """
    yield from ((name, stored_weight(model, name)) for name in stored_names(model))


def stored_names(model: nn.Module) -> list[str]:
    """The name of every parameter, tied ones once."""
    tied = _tied(model)  # weights that were taken away are no longer one object
    return [name for name, parameter in model.named_parameters() if not (parameter.is_meta and name in tied)]


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """For the length of a block, a module's own weights are where it computes: for use without calling it."""
    with ExitStack() as stack:
        for hook in _hooks(module):
            if getattr(hook, "offload", False):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def is_spread(model: nn.Module) -> bool:
    """Whether hooks bring weights or arguments to some of the model's modules."""
    return any(_hooks(module) for module in model.modules())


def comes_and_goes(layer: nn.Module) -> bool:
    """Whether some of a layer's weights are only there while it is called: it had better keep no graph."""
    return hasattr(layer, BROUGHT) or brought_at_every_call(layer)


def brought_at_every_call(layer: nn.Module) -> bool:
    """Whether accelerate brings some of a layer's weights anew whenever it is called."""
    return any(getattr(hook, "offload", False) for module in layer.modules() for hook in _hooks(module))


def downwards(layers: nn.ModuleList, to: int) -> AbstractContextManager[None]:
    """For the length of a block, layers are called in descending order, down to this one: the next is brought ahead."""
    found: AbstractContextManager[None] | None = None
    if hasattr(layers[to], BROUGHT):
        found = getattr(layers[to], BROUGHT).downwards(to)
    return found or nullcontext()


def check_placement(model: nn.Module, layers: nn.ModuleList | None = None) -> None:
    """Raises InputError where a model lies in a way that can't be worked with, and says how it should be loaded."""
    from torch.distributed.tensor import DTensor

    tensor_parallel = (getattr(model, "_tp_size", None) or 1) > 1
    sharded = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if tensor_parallel or sharded:
        raise InputError(
            "the model's weights are split among processes (tensor parallelism)",
            expected="whole weights in every process",
            got=f"{sharded} is a DTensor" if sharded else f"tp_size={getattr(model, '_tp_size', None)}",
            do="load it without tp_plan, tp_size or FSDP; a model that is too large for one GPU is spread by"
            " device_map, and requests are shared among processes by torchrun",
        )
    devices = {str(device_of(module)) for module in model.modules() if next(module.parameters(recurse=False), None)
               is not None}  # fmt: skip
    lost = next((name for name, p in model.named_parameters() if p.is_meta and _weights(model, name) is None), None)
    if lost or (len(devices) > 1 and not is_spread(model)):
        raise InputError(
            "the model's weights are not all in one place",
            expected="one device, or a model that was loaded with device_map",
            got=f"no data for {lost}" if lost else ", ".join(sorted(devices)),
            do="load it on one device, or with device_map, whose hooks bring weights and inputs together",
        )
    for index, layer in enumerate(layers or ()):
        within = {str(device_of(module)) for module in layer.modules() if module is layer or _hooks(module)}
        if len(within) > 1:
            raise InputError(
                f"layer {index} is split among devices",
                expected="every decoder layer on one device",
                got=", ".join(sorted(within)),
                do="give a device_map that names whole layers",
            )


def _hooks(module: nn.Module) -> list[Any]:
    """What brings a module's weights or arguments: accelerate's hooks, our staging."""
    hook = getattr(module, "_hf_hook", None)
    ours = [getattr(module, BROUGHT)] if hasattr(module, BROUGHT) else []
    return ours + ([] if hook is None else list(getattr(hook, "hooks", [hook])))


def _tied(model: Any) -> set[str]:
    """Names of the parameters that are others' under a second name, as transformers keeps them."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return set()
    return {*(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())}


def _away(module: nn.Module, name: str) -> tuple[Any, str]:
    """The map that a parameter without data is brought from, and its key there."""
    found = _weights(module, name)
    if found is None:
        raise InputError(
            f"{name} holds no data (meta device)",
            expected="weights in memory, or left to accelerate's hooks",
            do="load the model with its weights",
        )
    weights, key = found
    while hasattr(weights, "prefix"):  # accelerate's PrefixedDataset: the same map for every module
        weights, key = weights.dataset, weights.prefix + key
    return weights, key


def _weights(module: nn.Module, name: str) -> tuple[Any, str] | None:
    """The innermost hook's map that has a parameter, and the parameter's name for that hook."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        owner = module.get_submodule(".".join(parts[:depth]))
        for hook in _hooks(owner):
            weights = getattr(hook, "weights_map", None)
            if getattr(hook, "offload", False) and weights is not None:
                return weights, ".".join(parts[depth:])
    return None
