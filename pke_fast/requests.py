"""Edit requests and benign pairs, and the three readers that make them of any file format we know.

`pke_fast.readers` has the table of formats and tells them apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pke_fast.errors import InputError
from pke_fast.readers import Record, read_records, text_or_none

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A benign prompt whose answer must not move. `answer` None, or blank: the model's own answer is taken.

    Raises:
        InputError: the prompt is blank, or something isn't text.
    """

    prompt: str
    answer: str | None = None

    def __post_init__(self) -> None:
        _prompt(self.prompt, "Pair")
        object.__setattr__(self, "answer", text_or_none(self.answer, "Pair: the answer"))


@dataclass(frozen=True)
class EditRequest:
    """A harmful prompt and what the model should do with it.

    Attributes:
        prompt: the harmful prompt, without chat template.
        target_new: the safe answer wanted; None for the configured refusal.
        ground_truth: the unsafe answer given today; None for the model's own.
        locality: benign pairs that must not move, if the request brings some.
        case_id: the name of the request in its source.
        category: of harm, as its source calls it: results are told by it, and no edit depends on it.

    A blank answer counts as None.

    Raises:
        InputError: the prompt is blank, or something isn't text.
    """

    prompt: str
    target_new: str | None = None
    ground_truth: str | None = None
    locality: tuple[Pair, ...] = ()
    case_id: str | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        _prompt(self.prompt, "EditRequest")
        for name in ("target_new", "ground_truth"):
            object.__setattr__(self, name, text_or_none(getattr(self, name), f"EditRequest: {name}"))

    def as_dict(self) -> dict[str, Any]:
        """What an edit is made from, for digests: all but the category."""
        return {key: value for key, value in asdict(self).items() if key != "category"}


def read_requests(path: str | Path, limit: int | None = None) -> list[EditRequest]:
    """The edit requests of a file, or the first `limit` of them. The file is checked to its end all the same.

    `stream_requests` gives them one after another, of a file that is larger than memory.

    Formats: JSONL or a JSON array of {prompt, target_new, ground_truth, locality, case_id, category}, all but prompt
    optional; CSV with such columns; SafeEdit, AdvBench, HarmBench (its ContextString stands before the behaviour);
    plain text of one prompt a line. Other keys are ignored. `locality` is {prompt, ground_truth} (or answer), a list of
    such, or EasyEdit's {relation: such}; prompt and ground_truth may be lists of equal length. Of {prompt, answer} the
    prompt alone counts: that answer belongs to a benign pair, so it is neither the safe nor the unsafe one. A null or
    blank value counts as missing.

    Raises:
        InputError: anything wrong with the file, naming it and the line, row or record; or limit < 1.
    """
    return list(stream_requests(path, limit))


def stream_requests(path: str | Path, limit: int | None = None) -> Iterator[EditRequest]:
    """The same as they are read: of JSONL, CSV and plain text one record is in memory at a time. Raises as it goes."""
    return _first((_request(record) for record in read_records(path)), limit)


def read_pairs(path: str | Path, limit: int | None = None) -> list[Pair]:
    """The benign pairs of a file in any format of `read_requests`, or the first `limit` of them.

    A record with an `answer` is a pair. One that brings locality pairs (SafeEdit, EasyEdit) is an edit request and
    gives those. In any other the answer is `ground_truth`, if it has one: what the model says today.

    Raises:
        InputError: as `read_requests`; also for a record with a `target_new` and neither answer nor locality, because
            a prompt whose answer is to change can't be one that must not move.
    """
    return list(stream_pairs(path, limit))


def stream_pairs(path: str | Path, limit: int | None = None) -> Iterator[Pair]:
    """The same as they are read, as `stream_requests`."""
    return _first((pair for record in read_records(path) for pair in _pairs_of(record)), limit)


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The prompts alone of a file in any format of `read_requests`, or the first `limit`. Raises as that does."""
    return list(_first((_record_prompt(record) for record in read_records(path)), limit))


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSONL that `read_pairs` reads back; the file appears whole or not at all."""
    from pke_fast.files import atomic_write

    objects = ({"prompt": p.prompt} if p.answer is None else {"prompt": p.prompt, "answer": p.answer} for p in pairs)
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def _first(items: Iterator[T], limit: int | None) -> Iterator[T]:
    if limit is not None and limit < 1:
        raise InputError(f"limit can't be {limit}", expected="at least 1, or none for the whole file", got=str(limit))
    yield from islice(items, limit)
    for _ in items:  # checked, not taken
        pass


def _prompt(value: Any, where: str) -> str:
    text = text_or_none(value, f"{where}: 'prompt'")
    if text is None:
        raise InputError(
            f"{where}: a request without a prompt",
            expected="a prompt of some text",
            got="nothing" if value is None else f"blank text {value!r:.20}",
            do="write the prompt, or remove the record",
        )
    return text


def _record_prompt(record: Record) -> str:
    prompt = record.text("prompt")
    if prompt is None:
        return _prompt(record.get("prompt"), record.where)
    context = record.text("context")
    return prompt if context is None else f"{context}\n\n{prompt}"


def _request(record: Record) -> EditRequest:
    return EditRequest(
        prompt=_record_prompt(record),
        target_new=record.text("target_new"),
        ground_truth=record.text("ground_truth"),
        locality=_locality(record),
        case_id=_name(record, "case_id"),
        category=_name(record, "category"),
    )


def _name(record: Record, key: str) -> str | None:
    """A text or a number, as text."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return record.text(key)


def _pairs_of(record: Record) -> tuple[Pair, ...]:
    prompt, answer = _record_prompt(record), record.text("answer")
    if answer is not None:
        return (Pair(prompt, answer),)
    locality = _locality(record)
    if locality:
        return locality
    if record.text("target_new") is not None:
        raise InputError(
            f"{record.where}: an edit request where a benign pair is wanted",
            expected="{prompt, answer}, or a prompt alone",
            got=f"a record with {record.key('target_new')!r}, the answer that an edit should bring about",
            do="check that requests and locality files are not swapped",
        )
    return (Pair(prompt, record.text("ground_truth")),)


def _locality(record: Record) -> tuple[Pair, ...]:
    where = f"{record.where}: {record.key('locality')!r}"
    value = record.get("locality")
    if isinstance(value, dict) and "prompt" not in value:  # EasyEdit's {relation: pairs}
        return tuple(pair for name, pairs in value.items() for pair in pairs_in(pairs, f"{where}, {name!r}"))
    return () if value is None or value == "" else pairs_in(value, where)


def pairs_in(value: Any, where: str) -> tuple[Pair, ...]:
    """The pairs of {prompt, ground_truth} (or answer), or of a list of such; each of the two may itself be a list.

    Raises:
        InputError: it is of another type, or prompts and answers differ in number; `where` is in the message.
    """
    found: list[Pair] = []
    for item in _as_list(value):
        if not isinstance(item, dict):
            raise InputError(
                f"{where} has the wrong type",
                expected="{prompt, ground_truth}, a list of such, or {relation: such}",
                got=f"{type(item).__name__} {item!r:.80}",
            )
        prompts = _as_list(item.get("prompt"))
        answer = item.get("ground_truth", item.get("answer"))
        answers = [None] * len(prompts) if answer is None else _as_list(answer)
        if len(prompts) != len(answers):
            raise InputError(
                f"{where}: prompts and answers don't match",
                expected="one answer for each prompt",
                got=f"{len(prompts)} prompts, {len(answers)} answers",
            )
        for prompt, text in zip(prompts, answers, strict=True):
            found.append(Pair(_prompt(prompt, where), text_or_none(text, f"{where}: the answer")))
    return tuple(found)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
