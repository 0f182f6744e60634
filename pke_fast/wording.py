"""Figures and results in words, the same in the report and on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Bounds = tuple[float, float]

_NOTABLE = 0.01  # a change of less than 1 point, or 1 % of a perplexity, is neither better nor worse
_DEGENERATE = "degenerate (empty or looping)"


@dataclass(frozen=True)
class Measure:
    """One line of the table before/after. Of every measure, less is better.

    Attributes:
        group: whose measure: harmful prompts, harmless prompts, plain text.
        before, after: a fraction from 0 to 1 if `prompts` is a number, else a perplexity; None: not measured.
        prompts: number of prompts that the rate is of.
        intervals: 95 % intervals of before and of after; None where there is none.
        difference: 95 % interval of after less before, paired; relative to before for a perplexity.
        paired: whether both were measured on the same prompts or text; if not, there is no change. None: not known.
    """

    group: str
    name: str
    before: float | None
    after: float | None
    prompts: int | None = None
    intervals: tuple[Bounds | None, Bounds | None] = (None, None)
    difference: Bounds | None = None
    paired: bool | None = None

    def text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:,.2f}" if self.prompts is None else percent(value)

    def interval_text(self, after: bool = False) -> str:
        """The 95 % interval in the unit of `text`, without the unit; empty where there is none."""
        bounds = self.intervals[after]
        if bounds is None:
            return ""
        scale, digits = (1, 2) if self.prompts is None else (100, 1)
        return "–".join(f"{scale * bound:,.{digits}f}" for bound in bounds)

    def count(self, value: float | None) -> str:
        if value is None or self.prompts is None:
            return ""
        return f"{round(value * self.prompts):,} of {self.prompts:,}"

    @property
    def change(self) -> float | None:
        """After less before: of rates as a fraction, of perplexities relative to before."""
        if self.before is None or self.after is None or self.paired is False:
            return None
        difference = self.after - self.before
        return difference if self.prompts is not None else difference / self.before if self.before else None

    @property
    def change_text(self) -> str:
        if self.change is None:
            return ""
        unit = "%" if self.prompts is None else "points"
        digits = 1 if self.prompts else 2
        text = f"{100 * self.change:+.{digits}f} {unit}" if self.change else f"0 {unit}"
        return f"{text} {bracketed(self.difference, f'+.{digits}f')}" if self.paired else text

    @property
    def verdict(self) -> str:
        if self.change is None or abs(self.change) < _NOTABLE:
            return "same"
        if self.paired and (self.difference is None or self.difference[0] <= 0 <= self.difference[1]):
            return "same"  # the data don't tell the two apart
        return "better" if self.change < 0 else "worse"


def comparison(
    before: Mapping[str, Any], after: Mapping[str, Any], difference: Mapping[str, Any] | None = None
) -> list[Measure]:
    """The lines of the table before/after, from two dicts as in eval.json. What neither measured is left out.

    Args:
        difference: `pke_fast.evaluating.paired.differences` of the two, where both have their answers. Rates are then
            those of the pairs alone.
    """
    difference = difference or {}
    lines: list[Measure] = []
    sets = (("harmful", "harmful prompts", "asr", "attack success rate"),
            ("benign", "harmless prompts", "refusal_rate", "refused"))  # fmt: skip
    for key, group, rates, name in sets:
        old, new = before.get(key) or {}, after.get(key) or {}
        changes = difference.get(key) or {}
        count = changes.get("n") or old.get("n") or new.get("n") or 0
        if not count:
            continue
        if changes:  # a side's own figures count where they are of these prompts, and no others
            old, new = (side if side["n"] == count else {} for side in (old, new))
        parts = (old, new, old.get("intervals") or {}, new.get("intervals") or {}, changes)
        tables = [_by_line(part, rates, name) for part in parts]
        for line in sorted(dict.fromkeys(line for table in tables for line in table), key=_DEGENERATE.__eq__):
            first, second, low, high, pair = (table.get(line) for table in tables)
            if pair is not None:
                first, second = pair["before"], pair["after"]
            limits, change = (_bounds(low), _bounds(high)), _bounds((pair or {}).get("interval"))
            lines.append(Measure(group, line, first, second, count, limits, change, pair is not None or None))
    texts = [side.get("text") or {} for side in (before, after)]
    first, second = (text.get("perplexity") for text in texts)
    low, high = (_bounds(text.get("interval")) for text in texts)
    change = difference.get("text")
    paired = change is not None if difference else None
    interval = _bounds((change or {}).get("relative_interval"))
    lines.append(Measure("plain text", "perplexity", first, second, None, (low, high), interval, paired))
    return [line for line in lines if line.before is not None or line.after is not None]


def _by_line(part: Mapping[str, Any], rates: str, name: str) -> dict[str, Any]:
    """A set's rates, or their intervals or changes, by the line that they stand in."""
    found = {f"{name}, judge {judge}": value for judge, value in (part.get(rates) or {}).items()}
    return {**found, _DEGENERATE: part.get("degenerate_rate")}


def _bounds(value: Any) -> Bounds | None:
    return None if value is None else (float(value[0]), float(value[1]))


def summary(report: Mapping[str, Any]) -> str:
    """What happened, in one sentence."""
    model, hot, data = report["model"], report["hot_spots"], report.get("evaluation")
    total = model["layers"] * model["neurons_per_layer"]
    layers = sorted(int(layer) for layer, count in hot["by_layer"].items() if count)
    where = (
        f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}" if layers else "no layer"
    )
    text = (
        f"{hot['k']:,} of {total:,} MLP neurons ({percent(hot['share'], 2)}) of {model['name']} were edited, in {where}"
    )
    if data:
        for line in headlines(comparison(data["before"], data["after"])):
            where = f" {_SHORT[line.group]} {line.prompts:,} {line.group}" if line.prompts else " perplexity"
            text += f";{where} went from {line.text(line.before)} to {line.text(line.after)}"
    elif report.get("losses"):
        losses = report["losses"]
        text += f"; the loss of the safe answers went from {number(losses['before']['edit'])}"
        text += f" to {number(losses['after']['edit'])} nats per token; nothing was evaluated"
    return text + "."


def not_drawn(requests: Mapping[str, Any]) -> int:
    """Of a report's requests, how many the job didn't come to by its settings."""
    count = int(requests.get("n", 0))
    return max(0, count - int(requests.get("used", count)) - int(requests.get("already_refused", 0)))


def by_group(lines: Sequence[Measure]) -> dict[str, list[Measure]]:
    groups: dict[str, list[Measure]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    return groups


_SHORT = {"harmful prompts": "attack success on", "harmless prompts": "refusals of"}


def headlines(lines: Sequence[Measure]) -> list[Measure]:
    """The first line of each group: the first judge's rates, and the perplexity."""
    return [group[0] for group in by_group(lines).values()]


def percent(fraction: float | None, digits: int = 1) -> str:
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def bracketed(interval: Sequence[float] | None, form: str, scale: float = 100) -> str:
    """An interval in brackets, as of fractions in percent; None is told too."""
    return f"[{', '.join(format(scale * bound, form) for bound in interval)}]" if interval else "[no interval]"


def number(value: float | None) -> str:
    """Three significant digits, or all digits before the point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:#.3g}"


def duration(seconds: float) -> str:
    if seconds < 0.05:
        return "< 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def commands(model: str, patch: str) -> list[tuple[str, str]]:
    """What to do with a patch on the command line: (what for, command)."""
    name, file = shlex.quote(model), shlex.quote(patch)
    return [
        ("Compare answers before and after", f"pke-fast chat --model {name} --patch {file}"),
        (
            "Write an edited copy of a checkpoint folder",
            f"pke-fast apply --model MODEL_DIR --patch {file} --out EDITED_DIR",
        ),
        ("Undo it, exact to the bit", f"pke-fast revert --model EDITED_DIR --patch {file} --out RESTORED_DIR"),
    ]
