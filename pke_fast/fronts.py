"""What an edit was chosen from, as points: attack success against refusals of harmless prompts, drawn as runs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pke_fast.evaluating.comparing import Run
from pke_fast.evaluating.scatter import scatter_png
from pke_fast.intervals import wilson

FIRST_TOKEN = "the refusal's first token"  # the judge, where no answers were made


def before_after_png(evaluation: Mapping[str, Any], *, dark: bool = False) -> bytes | None:
    """A scatter of `before` and `after`, each as in eval.json; None where one lacks rates or their intervals."""
    runs = [Run(when, evaluation[when], ()) for when in ("before", "after")]
    known = all((run.figures.get(part) or {}).get("intervals") for run in runs for part in ("harmful", "benign"))
    return scatter_png(runs, dark=dark) if known else None


def strengths_png(tried: Sequence[Mapping[str, Any]], taken: float, *, dark: bool = False) -> bytes | None:
    """A scatter of strengths, each as `pke_fast.strength.Tried` has it; None where no harmless prompts were held."""
    runs = []
    for one in (one for one in tried if one["held"]):
        figures = {
            "harmful": _rate("asr", one["unseen"] - one["refused"], one["unseen"]),
            "benign": _rate("refusal_rate", one["held_refused"], one["held"]),
        }
        name = f"{one['strength']:g}{', taken' if one['strength'] == taken else ''}"
        runs.append(Run(name, figures, ()))
    return scatter_png(runs, dark=dark) if runs else None


def _rate(key: str, count: int, n: int) -> dict[str, Any]:
    return {key: {FIRST_TOKEN: count / n}, "intervals": {key: {FIRST_TOKEN: list(wilson(count, n))}}}
