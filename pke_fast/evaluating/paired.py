"""What changed between two evaluations of the same prompts: differences with 95 % intervals, paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pke_fast.errors import InputError
from pke_fast.evaluating.measured import why_unpaired
from pke_fast.intervals import listed, paired_difference, ratio_interval

Row = Mapping[str, Any]
_RATES = {"harmful": "asr", "benign": "refusal_rate"}


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    answers_before: Sequence[Row],
    answers_after: Sequence[Row],
) -> dict[str, Any]:
    """After less before, of every figure that both evaluations have.

    Args:
        before, after: dicts as in eval.json.
        answers_before, answers_after: their rows as in generations.jsonl. Rows are paired by set and prompt (the
            first occurrence with the first, and so on); what only one of the two has is left out.

    Returns:
        ``{"harmful": {"n", "asr": {judge: {"before", "after", "difference", "interval"}}, "degenerate_rate": {...}},
        "benign": ..., "text": {"relative", "relative_interval"}}``; None for a set that isn't in both. Rates are
        fractions of the n pairs. A perplexity's change is relative to before, and known where both are finite and read
        the same windows; its interval is None of a single window.

    Raises:
        InputError: both have a set, and not one prompt of it in common.
    """
    found: dict[str, Any] = {}
    for name, key in _RATES.items():
        both = before.get(name) is not None and after.get(name) is not None
        found[name] = _set_differences(name, key, answers_before, answers_after) if both else None
    found["text"] = _text_difference(before.get("text"), after.get("text"))
    return found


def pairs(name: str, first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows of a set that both have, in the order of the first.

    Raises:
        InputError: there are none.
    """
    waiting: dict[str, list[Row]] = {}
    for row in second:
        if row["set"] == name:
            waiting.setdefault(row["prompt"], []).append(row)
    found = []
    for row in first:
        others = waiting.get(row["prompt"]) if row["set"] == name else None
        if others:
            found.append((row, others.pop(0)))
    if not found:
        raise InputError(
            f"the two evaluations can't be paired: no {name} prompt is in both",
            expected="evaluations of the same prompts",
            do="evaluate both models with the same files",
        )
    return found


def succeeded(row: Row, judge: str) -> bool:
    """Whether an attack succeeded by one judge: not refused, or harmful where the judge tells harm."""
    refused: Mapping[str, bool] = row["refused"]
    return not refused[judge] if judge in refused else bool(row["harmful"][judge])


def judges_of(row: Row) -> list[str]:
    """The judges of a row, in order; those that tell harm come last."""
    return [*row["refused"], *row.get("harmful", {})]


def _set_differences(name: str, key: str, first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any]:
    matched = pairs(name, first, second)
    judges = [judge for judge in judges_of(matched[0][0]) if judge in judges_of(matched[0][1])]
    if key == "refusal_rate":
        judges = [judge for judge in judges if judge in matched[0][0]["refused"]]

    def verdicts(side: int, judge: str) -> list[float]:
        if key == "asr":
            return [float(succeeded(pair[side], judge)) for pair in matched]
        return [float(pair[side]["refused"][judge]) for pair in matched]

    def difference(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
        change, interval = paired_difference(one, other)
        rates = {"before": math.fsum(one) / len(one), "after": math.fsum(other) / len(other)}
        return {**rates, "difference": change, "interval": listed(interval)}

    degenerate = [[float(pair[side]["degenerate"]) for pair in matched] for side in (0, 1)]
    return {
        "n": len(matched),
        key: {judge: difference(verdicts(0, judge), verdicts(1, judge)) for judge in judges},
        "degenerate_rate": difference(*degenerate),
    }


def _text_difference(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if before is None or after is None or why_unpaired(before, after) is not None:
        return None
    if before["perplexity"] is None or after["perplexity"] is None:
        return None
    tokens = before["tokens"]
    changes = [new - old for old, new in zip(before["nll"], after["nll"], strict=True)]
    interval = ratio_interval(changes, tokens)
    relative = math.expm1(math.fsum(changes) / sum(tokens))
    try:
        bounds = interval and [math.expm1(bound) for bound in interval]
    except OverflowError:  # too large for a number
        bounds = None
    return {"relative": relative, "relative_interval": bounds}
