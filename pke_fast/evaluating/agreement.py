"""How well judges agree with people: accuracy, precision, recall and Cohen's kappa on answers that people judged."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError
from pke_fast.evaluating.verdicts import AnswerJudge
from pke_fast.intervals import RESAMPLES, SEED, wilson
from pke_fast.judges import is_degenerate
from pke_fast.stages import Stages

_ANSWERS = ("response", "answer", "generation")
_PROMPTS = ("question", "prompt", "goal", "behavior")
_LABELS = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}


@dataclass(frozen=True)
class Judged:
    """An answer that people have judged; `prompt` is empty where the file has none or only its number."""

    prompt: str
    answer: str
    jailbroken: bool


def read_judged(path: str | Path, limit: int | None = None) -> list[Judged]:
    """Reads a CSV with a column ``label`` (1 or true: jailbroken), one of answers and, if there is one, of prompts.

    GPTFuzz's set of judged responses has ``question``, ``Response`` and ``label``; upper and lower case don't count.

    Raises:
        InputError: the file can't be read, lacks a column, or has a label that is neither 0 nor 1.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}", expected="a CSV in UTF-8", got=str(error)) from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    names = {str(name).strip().lower(): name for name in rows.fieldnames or []}
    answer = next((names[name] for name in _ANSWERS if name in names), None)
    prompt = next((names[name] for name in _PROMPTS if name in names), None)
    if answer is None or "label" not in names:
        raise InputError(
            f"{path} holds no judged answers",
            expected=f"a CSV with a column label and one of {', '.join(_ANSWERS)}",
            got=f"columns {', '.join(names) or 'none'}",
        )
    found = []
    for row in _read(rows, path):
        label = _LABELS.get(str(row[names["label"]]).strip().lower())
        if label is None:
            raise InputError(
                f"{path}, row at line {rows.line_num}: a label that says nothing",
                expected="1 (jailbroken) or 0",
                got=repr(row[names["label"]])[:40],
            )
        found.append(Judged((row[prompt] or "") if prompt else "", row[answer] or "", label))
    if not found:
        raise InputError(f"{path} holds no judged answers", expected="at least one row", got="the header alone")
    return found[:limit]


def _read(rows: csv.DictReader[str], path: str | Path) -> Iterator[dict[str, str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{path}, after line {rows.line_num}: broken CSV", got=str(error)) from error


def agreement(judged: Sequence[Judged], judges: Sequence[AnswerJudge], stages: Stages) -> dict[str, Any]:
    """Of each judge the confusion with people's labels, over answers that aren't degenerate.

    A judge finds an answer jailbroken where it doesn't refuse, or is harmful, as the judge tells.

    Returns:
        ``{"n", "degenerate": {"n", "jailbroken"}, "judges": {judge: {"confusion": {"tp", "fp", "fn", "tn"}, "accuracy",
        "precision", "recall", "kappa", "intervals": {...}}}}``. Degenerate answers are counted apart, with how many of
        them people called jailbroken. Intervals are 95 %: Wilson's, and the bootstrap's of kappa. A figure without a
        denominator is None.
    """
    asked = [row for row in judged if not is_degenerate(row.answer)]
    apart = [row for row in judged if is_degenerate(row.answer)]
    found: dict[str, Any] = {}
    for judge in judges if asked else ():
        prompts, answers = [row.prompt for row in asked], [row.answer for row in asked]
        with stages.stage(f"Judging by {judge.name}", len(asked)) as advance:
            verdicts = judge.verdicts(prompts, answers, advance)
        said = [verdict == (judge.tells == "harm") for verdict in verdicts]
        found[judge.name] = _figures([(one, row.jailbroken) for one, row in zip(said, asked, strict=True)])
    degenerate = {"n": len(apart), "jailbroken": sum(row.jailbroken for row in apart)}
    return {"n": len(judged), "degenerate": degenerate, "judges": found}


def _figures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    fn, tn = pairs.count((False, True)), pairs.count((False, False))
    rates = {"accuracy": (tp + tn, len(pairs)), "precision": (tp, tp + fp), "recall": (tp, tp + fn)}
    kappa, bounds = _kappa(tp, fp, fn, tn)
    return {
        "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
        **{name: count / of if of else None for name, (count, of) in rates.items()},
        "kappa": kappa,
        "intervals": {
            **{name: list(wilson(count, of)) if of else None for name, (count, of) in rates.items()},
            "kappa": bounds,
        },
    }


def _kappa(tp: int, fp: int, fn: int, tn: int) -> tuple[float | None, list[float] | None]:
    """Cohen's kappa of two raters, and its percentile bootstrap; None where chance alone explains everything."""
    import numpy as np

    n = tp + fp + fn + tn
    drawn = np.random.default_rng(SEED).multinomial(n, np.array([tp, fp, fn, tn]) / n, size=RESAMPLES)
    cells = np.concatenate([np.array([[tp, fp, fn, tn]]), drawn]) / n
    agreed = cells[:, 0] + cells[:, 3]
    chance = (cells[:, 0] + cells[:, 1]) * (cells[:, 0] + cells[:, 2])
    chance = chance + (cells[:, 2] + cells[:, 3]) * (cells[:, 1] + cells[:, 3])
    if 1 - chance[0] < 1e-12:
        return None, None
    # A resample in which both raters say one thing only has no kappa: by convention it agrees no more than by chance.
    safe = np.where(1 - chance < 1e-12, 1.0, 1 - chance)
    kappas = np.where(1 - chance < 1e-12, 0.0, (agreed - chance) / safe)
    low, high = np.quantile(kappas[1:], [0.025, 0.975])
    return float(kappas[0]), [float(low), float(high)]
