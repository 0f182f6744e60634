"""General ability: multiple-choice questions by log-likelihood.

Two forms of record, one JSON object a line: ``{"query", "choices", "gold"}`` (OpenBookQA's: which choice continues
the query) and ``{"context_options", "continuation", "gold"}`` (WinoGrande's: after which
context the continuation is likelier).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError
from pke_fast.evaluating.loglikelihood import continuation_logprobs, joined
from pke_fast.evaluating.measured import digest
from pke_fast.intervals import wilson


@dataclass(frozen=True)
class Question:
    """A question: (context, ending) of each option, and which one is right. An ending begins with its blank."""

    options: tuple[tuple[str, str], ...]
    gold: int


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file in either form, or the first `limit`; the file is checked to its end.

    Raises:
        InputError: the file can't be read, or a line isn't such a question; it names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}", expected="JSONL in UTF-8", got=str(error)) from error
    found = [_question(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no questions", expected="one JSON object a line")
    return found[:limit]


def _question(line: str, where: str) -> Question:
    expected = '{"query", "choices", "gold"} or {"context_options", "continuation", "gold"}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: broken JSON", expected=expected, got=str(error)) from error
    row = row if isinstance(row, dict) else {}
    if "query" in row:
        listed, one = row.get("choices"), row["query"]
    else:
        listed, one = row.get("context_options"), row.get("continuation")
    many = listed if isinstance(listed, list) else []
    if not isinstance(one, str) or not one or len(many) < 2 or not all(isinstance(i, str) and i.strip() for i in many):
        raise InputError(f"{where}: no question", expected=expected + ", with two texts to choose from", got=line[:80])
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(many):
        raise InputError(f"{where}: no right answer", expected=f"gold from 0 to {len(many) - 1}", got=repr(gold)[:40])
    options = [(one, text) if "query" in row else (text, one) for text in many]
    return Question(tuple((context.rstrip(), f" {ending.lstrip()}") for context, ending in options), gold)


def measure_ability(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """How many questions a model answers rightly: the option with the likeliest ending is its answer.

    Texts are scored as they are, without chat template. A tie goes to the first option.

    Args:
        advance: called with the number of options of a finished batch.

    Returns:
        ``{"n", "accuracy", "accuracy_normalised", "intervals": {...}, "correct", "correct_normalised", "sha256"}``.
        Normalised: the log-likelihood by characters of the ending, so that long endings aren't worse off. Intervals are
        Wilson's. For pairing, "correct" has 0 or 1 for each question, and "sha256" is the questions' digest.
    """
    flat = [option for question in questions for option in question.options]
    rows = [joined(tokenizer, context, ending) for context, ending in flat]
    scores = iter(zip(continuation_logprobs(model, tokenizer, rows, advance=advance), flat, strict=True))
    found: dict[str, list[int]] = {"": [], "_normalised": []}
    for question in questions:
        scored = [next(scores) for _ in question.options]
        plain = [score for score, _ in scored]
        normalised = [score / len(ending.strip()) for score, (_, ending) in scored]
        for key, values in (("", plain), ("_normalised", normalised)):
            found[key].append(int(values.index(max(values)) == question.gold))
    n = len(questions)
    return {
        "n": n,
        **{f"accuracy{key}": sum(right) / n for key, right in found.items()},
        "intervals": {f"accuracy{key}": list(wilson(sum(right), n)) for key, right in found.items()},
        **{f"correct{key}": right for key, right in found.items()},
        "sha256": digest([asdict(question) for question in questions]),
    }
