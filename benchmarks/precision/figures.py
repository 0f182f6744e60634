"""Figures of cells as text, less being better where they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pke_fast.intervals import paired_difference, ratio_interval, wilson
from pke_fast.wording import bracketed
from precision.sets import ALIKE, BENIGN, DOLLY, SAFE

NONE = "-"
Found = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def rate(count: int, n: int) -> str:
    """A rate with Wilson's interval."""
    low, high = wilson(count, n)
    return f"{percent(count / n)} [{100 * low:.0f}, {100 * high:.0f}]"


def counted_of(found: Found, run: str, name: str) -> dict[str, Any] | None:
    answers = found.get(f"answers, {run}")
    return None if answers is None else answers["sets"][name]


def degenerate(found: Found, run: str) -> tuple[float, str] | None:
    sets = [counted_of(found, run, name) for name in (DOLLY, SAFE, ALIKE, BENIGN)]
    counted = [part for part in sets if part is not None and part["degenerate"] is not None]
    if not counted:
        return None
    count, n = sum(part["degenerate"] for part in counted), sum(part["n"] for part in counted)
    return count / n, rate(count, n)


def ability(found: Found, run: str, name: str) -> tuple[float, str] | None:
    now = (found.get(f"damage, {run}") or {}).get("ability", {}).get(name)
    if now is None:
        return None
    if run == "vanilla":
        return 0.0, f"{percent(now['accuracy'])} right"
    base = (found.get("damage, vanilla") or {}).get("ability", {}).get(name)
    if base is None:
        return None
    change, interval = paired_difference(base["correct"][: now["n"]], now["correct"])
    return -change, f"{100 * change:+.1f} {bracketed(interval, '+.1f')}"


def perplexity(found: Found, run: str) -> tuple[float, str] | None:
    now = (found.get(f"damage, {run}") or {}).get("text")
    base = (found.get("damage, vanilla") or {}).get("text")
    if now is None or base is None:
        return None
    if run == "vanilla":
        return 0.0, f"{now['perplexity']:.2f}"
    changes = [new - old for old, new in zip(base["nll"], now["nll"], strict=True)]
    bounds = ratio_interval(changes, base["tokens"])
    interval = bounds and [math.expm1(bound) for bound in bounds]
    change = math.expm1(math.fsum(changes) / sum(base["tokens"]))
    return change, f"{100 * change:+.2f} % {bracketed(interval, '+.2f')}"


def kl(found: Found, run: str) -> tuple[float, str] | None:
    value = found.get(f"damage, {run}")
    return None if value is None or run == "vanilla" else (value["kl"], f"{value['kl']:.3g}")


def of_edit(found: Found, run: str, key: str, shown: Callable[[float], str]) -> tuple[float, str] | None:
    value = found.get(f"edit, {run}")
    return None if value is None else (value[key], shown(value[key]))


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
