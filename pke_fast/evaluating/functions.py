"""A user's own Python function, by name: a judge, or a preference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pke_fast.errors import InputError


def function_named(place: str, asked: str, does: str) -> Callable[..., Any]:
    """The function of ``MODULE:FUNCTION``.

    Args:
        asked, does: for a message: what was asked for by which name, and what such a function does.

    Raises:
        InputError: there is no such function, or its module can't be imported, whatever it raises.
    """
    module, _, function = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise InputError(
            f"{asked} can't be imported",
            expected="python:MODULE:FUNCTION, with the module on Python's path",
            got=f"{type(error).__name__}: {error}",
            do="check both names, and PYTHONPATH",
        ) from error
    if not callable(found):
        raise InputError(f"{asked} is no function that {does}", expected="a function", got=type(found).__name__)
    made: Callable[..., Any] = found
    return made


def values_of(said: Any) -> list[Any]:
    """What a function gave, as a list; of anything that is none, a list of it alone, for a check to refuse."""
    try:
        return list(said)
    except TypeError:
        return [said]
