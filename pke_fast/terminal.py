"""What a run shows on the terminal. Texts of models and files are never read as markup or control codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from pke_fast.console import (
    half_width,
    heading,
    new_table,
    one_line,
    safe,
    safe_text,
    show_pairs,
    show_table,
    show_text,
    side_by_side,
    wrapped,
)
from pke_fast.report import redacted
from pke_fast.wording import by_group, commands, comparison, duration, not_drawn, number, percent, size, summary

if TYPE_CHECKING:
    from rich.console import Console

    from pke_fast.wording import Measure

_LINES = 4  # of an answer; the report has it whole
_VERDICTS = {"better": "green", "worse": "red", "same": "dim"}


def edit_summary(console: Console, report: Mapping[str, Any], folder: Path, *, redact: bool = False) -> None:
    """All that an edit found out, in the order in which one asks; warnings come last, where they are seen."""
    heading(console, "Done")
    show_text(console, summary(report), indent=2)
    requests = report.get("requests") or {}
    if refused := requests.get("already_refused"):
        show_text(console, f"{refused:,} requests were left out: the model refuses them already.", indent=2)
    if others := not_drawn(requests):
        show_text(console, f"{others:,} other requests were not drawn.", indent=2)
    if held := requests.get("held_out"):
        show_text(console, f"{held:,} requests were held out of the edit, to measure it.", indent=2)
    evaluated = report.get("evaluation")
    if evaluated:
        before_after(console, evaluated["before"], evaluated["after"], evaluated.get("difference"))
    elif report.get("losses"):
        losses(console, report["losses"])
    answers(console, report.get("samples") or [], redact=redact)
    hot_spots(console, report)
    stages(console, report.get("stages") or [])
    plan(console, report.get("plan") or {})
    files(console, folder, report.get("files") or {})
    next_steps(console, report["model"]["name"], folder)
    warnings(console, report.get("warnings") or [])


def before_after(
    console: Console, before: Mapping[str, Any], after: Mapping[str, Any], difference: Mapping[str, Any] | None = None
) -> None:
    """A table of two evaluations (dicts as in eval.json), with the intervals of their difference where it is known."""
    lines = comparison(before, after, difference)
    _measures(console, "Before and after (less is better)", lines, both=True)
    if any(line.difference for line in lines):
        show_text(console, "In brackets: the change's 95 % interval, paired by prompt.", indent=2, style="dim")


def evaluation(console: Console, figures: Mapping[str, Any]) -> None:
    """A table of one evaluation (a dict as in eval.json)."""
    lines = comparison(figures, figures)
    if lines:
        _measures(console, "Evaluation (less is better)", lines, both=False)
    cost = figures.get("cost") or {}
    if cost.get("tokens_per_second"):
        speed = (
            f"{number(cost['tokens_per_second'])} tokens/s: {cost['tokens']:,} tokens in {duration(cost['seconds'])}"
        )
        reused = f"; {cost['reused']:,} answers were kept from an earlier run" if cost.get("reused") else ""
        show_text(console, speed + reused, indent=2, style="dim")


def losses(console: Console, found: Mapping[str, Any]) -> None:
    """The losses before and after, over all requests or some 256 of them, and why the edit stopped."""
    heading(console, "Losses in nats per token")
    table = new_table(("", "left"), ("before", "right"), ("after", "right"))
    for key, label in (("edit", "safe answers"), ("kl", "KL on harmless prompts")):
        values = [safe_text(console, number(found[side][key])) for side in ("before", "after")]
        table.add_row(label, *values)
    show_table(console, table)
    if found.get("stopped"):
        gain, strength = found.get("gain", 0), found.get("strength", 1)
        more = f"; detectors' gain {gain:g}" if gain else ""
        more += "" if strength == 1 else f"; strength {strength:g}"
        show_text(console, f"Stopped: {found['stopped']}{more}", indent=2, style="dim")


def answers(console: Console, samples: Sequence[Mapping[str, Any]], *, redact: bool = False, per_kind: int = 3) -> None:
    """Prompts with their answers before and after, side by side, long ones cut; a content warning comes first."""
    samples = redacted(samples, redact)
    kinds = {
        "Harmful prompts": [sample for sample in samples if sample["kind"] != "benign"][:per_kind],
        "Harmless prompts": [sample for sample in samples if sample["kind"] == "benign"][:per_kind],
    }
    for title, shown in kinds.items():
        if not shown:
            continue
        heading(console, f"{title}: answers before (left) and after (right)")
        if title == "Harmful prompts":
            what = "harmful requests" if redact else "harmful requests and answers to them"
            show_text(console, f"Content warning: {what} follow.", indent=2, style="bold yellow")
        for sample in shown:
            console.print()
            show_text(console, one_line(sample["prompt"]), indent=2, style="bold")
            width = half_width(console)
            before, after = (wrapped(console, one_line(sample[side]), width, _LINES) for side in ("before", "after"))
            side_by_side(console, before, after)


def exchange(console: Console, prompt: str, before: str, after: str | None = None) -> None:
    """One prompt with its answer, or with both answers side by side, whole."""
    console.print()
    show_text(console, prompt, style="bold")
    if after is None:
        show_text(console, before.strip() or "(empty)", indent=2)
        return
    side_by_side(console, [Text("before")], [Text("after")], style="dim")
    width = half_width(console)
    side_by_side(console, wrapped(console, before, width), wrapped(console, after, width))


def hot_spots(console: Console, report: Mapping[str, Any]) -> None:
    """Bars of how many hot spots each layer has, the uppermost layer first."""
    hot = report["hot_spots"]
    counts = {int(layer): int(count) for layer, count in hot["by_layer"].items() if count}
    heading(console, "Hot spots by layer")
    low, end = hot["window"]
    where = f"layer {low}" if end - low == 1 else f"layers {low} to {end - 1}"
    show_text(console, f"{hot['k']:,} neurons, sought in {where}", indent=2, style="dim")
    if not counts:
        return
    longest = min(60, max(10, console.width - 24))
    for layer in range(max(counts), min(counts) - 1, -1):
        count = counts.get(layer, 0)
        bar = "█" * max(1 if count else 0, round(longest * count / max(counts.values())))
        line = Text.assemble(f"  {layer:>4}  ", (safe(console, bar), "cyan"), f" {count:,}")
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def stages(console: Console, done: Sequence[Mapping[str, Any]]) -> None:
    """Seconds and peak memory of each stage."""
    if not done:
        return
    heading(console, "Time and memory")
    table = new_table(("", "left"), ("time", "right"), ("peak memory", "right"), ("over the model", "right"))
    for stage in done:
        cells = (stage["name"], duration(stage["seconds"]), size(stage["peak_bytes"]), size(stage["over_bytes"]))
        table.add_row(*(safe_text(console, cell) for cell in cells))
    table.add_section()
    peaks = [[stage[key] for stage in done if stage[key] is not None] for key in ("peak_bytes", "over_bytes")]
    total = (duration(sum(stage["seconds"] for stage in done)), *(size(max(peak, default=None)) for peak in peaks))
    table.add_row("all", *(safe_text(console, cell) for cell in total), style="bold")
    show_table(console, table)


def _offloaded(layers: Mapping[str, int]) -> dict[str, str]:
    """How many layers wait with the host, and where; nothing where none does."""
    count = sum(layers.values())
    return {"lowest layers that wait with the host": f"{count}, {layers['pinned']} of them pinned"} if count else {}


def plan(console: Console, found: Mapping[str, Any]) -> None:
    """How a job is run, and its memory: foretold and, where it was run, measured."""
    if "bytes" not in found:
        return
    kept = found["layers that keep their graph"]
    sizes, taken = found["bytes"], found.get("measured") or {}
    facts(
        console,
        "Plan",
        {
            "tokens at once": found["micro_batch_tokens"],
            "layers that keep their graph": f"{kept['scoring']} while scoring, {kept['editing']} in an edit step",
            **_offloaded(found["layers offloaded"]),
            "memory budget": "none" if found["budget"] is None else f"{found['budget'] / 2**30:.2f} GiB",
        },
    )
    table = new_table(("memory, MiB", "left"), ("foretold", "right"), ("measured", "right"))
    rows = (
        ("Python and its libraries", "process"),
        ("weights", "weights"),
        ("  weights besides, left on disk", "on_disk"),
        ("  weights besides, offloaded", "offloaded"),
        ("room for offloaded layers in use", "staging"),
        ("  score maps", "scores"),
        ("  a micro-batch, scored", "scoring"),
        ("locating, over the weights", "locating"),
        ("  cache of the layers below", "cache"),
        ("  hot spots, masters, moments", "columns"),
        ("  what its beginning sees of the prompts", "detectors"),
        ("  an edit step", "step"),
        ("editing, over the weights", "editing"),
        ("peak", "peak"),
    )
    for text, name in rows:
        measured = taken.get(name)
        table.add_row(text, f"{sizes[name] / 2**20:,.0f}", "" if measured is None else f"{measured / 2**20:,.0f}")
    show_table(console, table)
    if "seconds" in found:
        seconds = found["seconds"]
        text = f"about {seconds['locating']:,.0f} s to locate and {seconds['editing']:,.0f} s to edit"
        if "bringing" in seconds:
            text += f", or {seconds['bringing']:,.0f} s in all if bringing the offloaded layers takes longer"
        show_text(console, f"{text}, beside the answers that the model is asked for first", indent=1)
    warnings(console, found.get("notes") or [])


def files(console: Console, folder: Path, written: Mapping[str, str]) -> None:
    """The files written, and what each is."""
    if not written:
        return
    heading(console, "Files")
    show_text(console, str(folder), indent=2, style="bold", soft_wrap=True)
    show_pairs(console, written, indent=4)


def warnings(console: Console, messages: Sequence[str]) -> None:
    """Warnings, loudly."""
    for message in messages:
        console.print()
        show_text(console, f"WARNING: {message}", style="bold red")


def next_steps(console: Console, model: str, folder: Path) -> None:
    """What to do with the patch, and how to do the same with another model; commands aren't broken into lines."""
    heading(console, "Use it")
    for what, command in commands(model, str(Path(folder) / "patch.safetensors")):
        _command(console, what, command)
    heading(console, "The same with your own model and requests")
    _command(
        console,
        'MODEL: a hub id, a local folder or a .gguf file; FILE: lines of {"prompt": ...}, a CSV or plain text',
        "pke-fast edit --model MODEL --requests FILE --out DIR",
    )


def facts(console: Console, title: str, found: Mapping[str, Any]) -> None:
    """Labels and values under a title."""
    heading(console, title)
    show_pairs(console, found, indent=2)


def patch(console: Console, description: Mapping[str, Any]) -> None:
    """What a patch is (`Patch.describe`)."""
    base, found = description.get("base") or {}, description.get("losses") or {}
    known = {key: description.get(key) for key in ("method", "neurons", "dtype", "created")}
    known |= {"base": base.get("name"), "fingerprint": base.get("fingerprint")}
    known["made by"] = (description.get("made_from") or {}).get("how")
    facts(console, "Patch", {key: value for key, value in known.items() if value is not None})
    heading(console, "By layer")
    titles = ("layer", "projection", "weight", "neurons", "change")
    table = new_table(*((title, "left" if title in ("projection", "weight") else "right") for title in titles))
    for part in description["layers"]:
        numbers = (f"{part['neurons']:,}", percent(part["relative_change"]))
        cells = (part["layer"], part["projection"], part["weight"], *numbers)
        table.add_row(*(safe_text(console, cell) for cell in cells))
    show_table(console, table)
    if found.get("before") and found.get("after"):
        losses(console, found)


def doctor(console: Console, found: Mapping[str, Any]) -> None:
    """What is installed, what would run and what is missing."""
    flat = {key: value for key, value in found.items() if not isinstance(value, Mapping)}
    facts(console, "This machine", flat)
    for title, nested in found.items():
        if isinstance(nested, Mapping) and title != "ops":
            facts(console, title.capitalize(), nested)
    for device, chosen in found.get("ops", {}).items():
        facts(console, f"What the ops run in on {device}", chosen)


def _measures(console: Console, title: str, lines: Sequence[Measure], both: bool) -> None:
    heading(console, title)
    ends = [("before", "right"), ("after", "right"), ("change", "right")]
    ends = ends if both else [("", "right"), ("95 % interval", "right")]
    table = new_table(("", "left"), *ends)
    for group, members in by_group(lines).items():
        count = members[0].prompts
        table.add_row(Text(f"{group} ({count:,})" if count else group, style="bold"))
        for line in members:
            cells = [safe_text(console, f"  {line.name}"), safe_text(console, line.text(line.before))]
            if both:
                cells.append(safe_text(console, line.text(line.after), style="bold"))
                cells.append(safe_text(console, line.change_text, style=_VERDICTS[line.verdict]))
            else:
                cells.append(safe_text(console, line.interval_text(), style="dim"))
            table.add_row(*cells)
    show_table(console, table)


def _command(console: Console, what: str, command: str) -> None:
    show_text(console, what, indent=2, style="dim")
    show_text(console, command, indent=4, soft_wrap=True)
