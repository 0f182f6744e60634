"""What the public functions are called with, checked before anything is done: each likely mistake is told by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

from torch import nn

from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.loading import LoadedModel
from pke_fast.requests import EditRequest, Pair

T = TypeVar("T")

_MADE = {
    EditRequest: "EditRequest(prompt) makes one, read_requests(path) a list of them",
    Pair: "Pair(prompt, answer) makes one, read_pairs(path) a list of them",
    str: "read_prompts(path) gives those of a file",
}


def check_job(
    model: Any,
    tokenizer: Any,
    config: Any,
    memory_budget: Any,
    held_out: Any = (),
    compare: Any = None,
) -> None:
    """Raises InputError where an argument of `edit` or `locate`, but for requests and pairs, is of a wrong kind."""
    check_model(model)
    check_tokenizer(tokenizer)
    _check_config(config)
    check_items("held_out", held_out, str)
    whole = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (whole and memory_budget > 0):
        raise InputError(
            "memory_budget can't be used",
            expected="bytes, a whole number above 0, or None",
            got=shown(memory_budget),
            do="8 * 2**30 for 8 GiB",
        )
    if compare is not None and not callable(compare):
        raise _no_model("compare", compare)


def check_evaluation(
    model: Any, tokenizer: Any, harmful: Any, benign: Any, text: Any, config: Any, judges: Any
) -> None:
    """Raises InputError where an argument of `evaluate` is of a wrong kind."""
    check_model(model)
    check_tokenizer(tokenizer)
    _check_config(config)
    for name, prompts in (("harmful", harmful), ("benign", benign)):
        if prompts is not None:
            check_items(name, prompts, str)
    if text is not None and not isinstance(text, str):
        raise InputError("text can't be used", expected="a str, or None", got=shown(text), do="read the file first")
    if isinstance(judges, str):
        raise InputError("judges can't be used", expected="a list of names", got=shown(judges), do=f"[{judges!r}]")


def check_model(model: Any) -> None:
    """Raises InputError for anything but a torch module."""
    if not isinstance(model, nn.Module):
        raise _no_model("model", model)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises InputError for what can't be called as a tokenizer."""
    if callable(tokenizer):
        return
    loaded = isinstance(tokenizer, LoadedModel)
    raise InputError(
        "the tokenizer can't be used",
        expected="the model's tokenizer, of transformers",
        got=type(tokenizer).__name__ if loaded else shown(tokenizer),
        do="give loaded.tokenizer" if loaded else "load_model(name).tokenizer, or AutoTokenizer.from_pretrained(name)",
    )


def check_items(name: str, value: Any, kind: type, what: str | None = None) -> None:
    """Raises InputError where it is no sequence of such items; a text or a single item isn't one.

    Args:
        what: the items, in words.
    """
    if not isinstance(value, Sequence):
        raise _not_items(name, value, kind, what)
    checked_items(name, value, kind, what)


def checked_items(name: str, value: Iterable[T], kind: type[T], what: str | None = None) -> Iterable[T]:
    """The items of anything that can be gone through; those of a sequence are checked now, others as they come.

    Raises:
        InputError: as of `check_items`.
    """
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):  # a set has no order
        raise _not_items(name, value, kind, what)

    def items() -> Iterator[T]:
        for index, item in enumerate(value):
            if not isinstance(item, kind):
                raise _not_items(f"item {index} of {name}", item, kind, what)
            yield item

    if not isinstance(value, Sequence):
        return items()
    for _ in items():
        pass
    return value


def _not_items(name: str, value: Any, kind: type, what: str | None) -> InputError:
    expected, do = f"a list of {what or kind.__name__}", _MADE.get(kind)
    return InputError(f"{name} can't be used", expected=expected, got=shown(value), do=do)


def shown(value: Any) -> str:
    """A value's type, and how it begins."""
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, PKEConfig):
        raise InputError(
            "config can't be used",
            expected="a PKEConfig, or None for the defaults",
            got=shown(config),
            do="PKEConfig(**settings), or load_config(path)",
        )


def _no_model(name: str, value: Any) -> InputError:
    do = "load one: load_model(name).model"
    if isinstance(value, LoadedModel):
        do = "give loaded.model"
    got = shown(value) if isinstance(value, str) else type(value).__name__
    return InputError(f"{name} can't be used", expected="a model of transformers, in memory", got=got, do=do)
