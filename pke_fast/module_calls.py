"""Modules' calls: hooks for a while, another forward for a while, and a decoder layer's hidden state in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def first_tensor(output: Any) -> Tensor:
    """A layer's hidden state: some return it alone, some first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A decoder layer's call as its hidden state and the rest of its arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Keeps module hooks for the length of a block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for the length of a block; then what was there before, someone else's patch included."""
    own = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own
