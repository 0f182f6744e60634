"""What the evaluation suite shows on the terminal besides the table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pke_fast.console import heading, new_table, safe_text, show_table, show_text
from pke_fast.wording import number, percent

if TYPE_CHECKING:
    from rich.console import Console


def further(console: Console, figures: Mapping[str, Any]) -> None:
    """What an evaluation measured besides (more is better, but for the KL), each figure with its 95 % interval."""
    rows: list[tuple[str, str, str]] = []
    if (text := figures.get("text")) and text["perplexity"] is None:  # the table of the evaluation leaves it out
        rows.append(("perplexity", "not finite", ""))
    for metric, found in (figures.get("defense") or {}).items():
        for judge, rate in found["defended"].items():
            low, high = found["intervals"]["defended"][judge]
            rows.append((f"{metric}, judge {judge}", percent(rate), f"{100 * low:.1f}–{100 * high:.1f}"))
        rows.append((f"{metric}, degenerate", percent(found["degenerate_rate"]), ""))
    for name, found in (figures.get("ability") or {}).items():
        for key, label in (("accuracy", name), ("accuracy_normalised", f"{name}, by characters")):
            low, high = found["intervals"][key]
            rows.append((label, percent(found[key]), f"{100 * low:.1f}–{100 * high:.1f}"))
    for name, found in (figures.get("fluency") or {}).items():
        entropy, bounds = f"{found['ngram_entropy']:.2f} bits", found["interval"]
        rows.append((f"n-gram entropy of {name} answers", entropy, _range(bounds, ".2f")))
    for name, found in (figures.get("divergence") or {}).items():
        rows.append((f"KL to the base on {name}", f"{found['kl']:.4f} nats", _range(found["interval"], ".4f")))
    for task, found in (figures.get("lm_eval") or {}).items():
        numbers = {key: value for key, value in found.items() if isinstance(value, float) and "stderr" not in key}
        rows += [(f"{task}, {key}", number(value), "") for key, value in numbers.items()]
    if not rows:
        return
    heading(console, "Further figures")
    table = new_table(("", "left"), ("", "right"), ("95 % interval", "right"))
    for row in rows:
        table.add_row(*(safe_text(console, cell) for cell in row))
    show_table(console, table)


def _range(bounds: Sequence[float] | None, form: str) -> str:
    return "–" if bounds is None else "–".join(format(bound, form) for bound in bounds)


def foretold(console: Console, found: Mapping[str, Any] | None) -> None:
    """How precise an edit can be (`pke_fast.foretelling.foretell`)."""
    heading(console, "How precise an edit can be on these requests")
    if found is None:
        show_text(console, "Too few harmful or harmless prompts to tell.", indent=2, style="dim")
        return
    shares = ", ".join(f"{percent(row['share'])} at {100 * row['false_alarms']:g} %" for row in found["flagged"])
    text = f"A linear probe of layer {found['layer']} finds, of {found['harmful']:,} harmful requests, {shares} false"
    text += f" alarms among {found['harmless']:,} harmless prompts (AUC {found['auc']:.3f}, cross-validated)."
    show_text(console, text, indent=2)


def agreement(console: Console, found: Mapping[str, Any]) -> None:
    """How well judges agree with people (`pke_fast.evaluating.agreement.agreement`)."""
    heading(
        console, f"Agreement with people on {found['n']:,} answers, {found['degenerate']['n']:,} of them degenerate"
    )
    columns = ("accuracy", "precision", "recall", "kappa")
    table = new_table(("judge", "left"), *((column, "right") for column in columns))
    for judge, figures in found["judges"].items():
        cells = []
        for column in columns:
            value, bounds = figures[column], figures["intervals"][column]
            shown = [
                f"{bound:.2f}".lstrip("0") if column == "kappa" else f"{100 * bound:.0f}" for bound in bounds or ()
            ]
            point = "–" if value is None else f"{value:.2f}" if column == "kappa" else f"{100 * value:.1f}"
            cells.append(point if bounds is None else f"{point} ({'–'.join(shown)})")
        table.add_row(safe_text(console, judge), *(safe_text(console, cell) for cell in cells))
    show_table(console, table)
    show_text(
        console, "Of finding jailbroken answers, in percent; in parentheses: 95 % intervals.", indent=2, style="dim"
    )
