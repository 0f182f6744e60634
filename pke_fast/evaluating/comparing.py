"""Evaluations that were written, side by side: every run against the first, paired by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError
from pke_fast.evaluating.functions import values_of
from pke_fast.evaluating.measured import why_unpaired
from pke_fast.evaluating.paired import differences, pairs
from pke_fast.intervals import listed, mean_interval, paired_difference

# Of prompts, first answers and second answers: 1 where the second is better, 0 where the first is, 0.5 for neither.
Preference = Callable[[list[str], list[str], list[str]], Sequence[float]]

# Settings that change what a model answers.
_ANSWERING = ("max_new_tokens", "stop_early", "chat_template", "system_prompt", "suffix_system_prompt")


@dataclass(frozen=True)
class Run:
    """A folder that `pke-fast eval` wrote: its name, eval.json and the rows of generations.jsonl."""

    name: str
    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in folders, named after them, with so much of the path that the names differ.

    Raises:
        InputError: fewer than two folders, one named twice, or one that isn't the result of an evaluation.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise InputError(
            "nothing to compare", expected="two folders or more, each once", got=", ".join(map(str, folders))
        )
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [_read(path, "/".join(path.parts[-depth:])) for path in paths]


def _read(folder: Path, name: str) -> Run:
    try:
        figures = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        text = (folder / "generations.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} isn't an evaluation",
            expected="a folder with eval.json and generations.jsonl, as pke-fast eval writes it",
            got=str(error),
        ) from error
    if not isinstance(figures, dict) or "settings" not in figures:
        raise InputError(f"{folder} isn't an evaluation", expected="eval.json with settings in it")
    return Run(name, figures, rows)


def compare(runs: Sequence[Run], *, rouge: bool = False, preference: Preference | None = None) -> list[dict[str, Any]]:
    """Every run but the first against the first.

    Args:
        rouge: add ROUGE-L between the two runs' benign answers: how far these moved.
        preference: add the winrate of the run's benign answers over the first's.

    Returns:
        Of each: ``{"name", "against", **differences, "ability", "warnings", "rouge_l", "winrate"}``; the last two where
        both have what they need and only if asked for. The warnings say what isn't paired, and what else than the
        models differs.

    Raises:
        InputError: two runs have no prompt of a set in common, or ROUGE's package isn't installed.
    """
    first, found = runs[0], []
    for run in runs[1:]:
        result: dict[str, Any] = {"name": run.name, "against": first.name}
        result |= differences(first.figures, run.figures, first.rows, run.rows)
        result["ability"] = _ability(first.figures.get("ability") or {}, run.figures.get("ability") or {})
        result["warnings"] = _warnings(first, run, result)
        if result["benign"] is not None and (rouge or preference is not None):
            matched = pairs("benign", first.rows, run.rows)
            prompts, old, new = ([str(row) for row in column] for column in zip(*map(_texts, matched), strict=True))
            if rouge:
                result["rouge_l"] = rouge_l(old, new)
            if preference is not None:
                result["winrate"] = winrate(prompts, old, new, preference)
        found.append(result)
    return found


def _texts(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[str, str, str]:
    return pair[0]["prompt"], pair[0]["answer"], pair[1]["answer"]


def _ability(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Differences in accuracy, paired by question, of sets that both have with the same questions."""
    found: dict[str, Any] = {}
    for name in first:
        if name not in second or why_unpaired(first[name], second[name]) is not None:
            continue
        for key in ("accuracy", "accuracy_normalised"):
            right = key.replace("accuracy", "correct")
            change, interval = paired_difference(first[name][right], second[name][right])
            found.setdefault(name, {})[key] = {"difference": change, "interval": listed(interval)}
    return found


def _warnings(first: Run, run: Run, found: Mapping[str, Any]) -> list[str]:
    """What isn't paired and why, and what besides the models may have changed the answers."""
    old, new, said = first.figures, run.figures, []
    sets = [name for name in ("harmful", "benign") if found[name] is not None]
    for name in sets:
        n, counts = found[name]["n"], [figures[name]["n"] for figures in (old, new)]
        if max(counts) > n:
            has = f"{first.name} has {counts[0]:,}, {run.name} {counts[1]:,}"
            said.append(f"only {n:,} {name} prompts are in both ({has}): the rates are of those")
    one, other = (figures.get("settings") or {} for figures in (old, new))
    for key in _ANSWERING if sets else ():
        if key in one and key in other and one[key] != other[key]:
            said.append(f"{key} differs, {one[key]!r:.60} and {other[key]!r:.60}: the changes may come from that")
    for name, figures in ((first.name, old), (run.name, new)):
        if (text := figures.get("text")) and text["perplexity"] is None:
            said.append(f"the perplexity of {name} isn't finite")
    kinds = {"the perplexities": (old.get("text"), new.get("text"))}
    abilities = [figures.get("ability") or {} for figures in (old, new)]
    kinds |= {f"the answers to {name}": (part, abilities[1].get(name)) for name, part in abilities[0].items()}
    for what, (before, after) in kinds.items():
        why = why_unpaired(before, after) if before and after else None
        if why is not None:
            said.append(f"{what} aren't paired: {why}")
    return said


def rouge_l(first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """Mean ROUGE-L (F1, with stemming) of the second answers against the first, by the package rouge-score.

    Returns:
        ``{"n", "mean", "interval"}``; 1 where nothing changed.

    Raises:
        InputError: rouge-score isn't installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(
            "ROUGE-L needs the package rouge-score", got=str(error), do="pip install 'pke_fast[eval]', or leave it out"
        ) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    values = [
        1.0 if old == new else float(scorer.score(old, new)["rougeL"].fmeasure)  # two empty answers are the same too
        for old, new in zip(first, second, strict=True)
    ]
    return {"n": len(values), "mean": sum(values) / len(values), "interval": listed(mean_interval(values))}


def winrate(prompts: list[str], first: list[str], second: list[str], preference: Preference) -> dict[str, Any]:
    """How often the second answer is preferred; a tie counts half. Equal answers are ties, about which nobody is asked.

    Returns:
        ``{"n", "winrate", "interval", "ties"}``.

    Raises:
        InputError: the preference doesn't give 0, 0.5 or 1 for each pair.
    """
    values = [0.5] * len(prompts)
    asked = [index for index in range(len(prompts)) if first[index] != second[index]]
    columns = ([column[i] for i in asked] for column in (prompts, first, second))
    said = values_of(preference(*columns)) if asked else []
    if len(said) != len(asked) or any(value not in (0, 0.5, 1) for value in said):
        raise InputError(
            "the preference can't be read", expected=f"0, 0.5 or 1 for each of {len(asked)} pairs", got=repr(said)[:60]
        )
    for index, value in zip(asked, said, strict=True):
        values[index] = float(value)
    interval = listed(mean_interval(values))
    return {"n": len(values), "winrate": sum(values) / len(values), "interval": interval, "ties": values.count(0.5)}
