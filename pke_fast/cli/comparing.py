"""The command that sets evaluations side by side."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish
from pke_fast.cli.outputs import check_out
from pke_fast.evaluating.comparing import compare as compare_runs
from pke_fast.evaluating.comparing import read_runs
from pke_fast.evaluating.outputs import write_json
from pke_fast.evaluating.preference import open_preference
from pke_fast.evaluating.scatter import scatter_png
from pke_fast.files import atomic_folder
from pke_fast.wording import bracketed, percent


def compare(options: Namespace) -> None:
    runs = read_runs(options.runs)
    if options.out:
        check_out(options)
    picture = scatter_png(runs, options.judge) if options.out or options.judge else None
    preference = open_preference(options.winrate, options.device) if options.winrate else None
    found = compare_runs(runs, rouge=options.rouge, preference=preference)
    summary = {"runs": [{"name": run.name, **run.figures} for run in runs], "comparisons": found}
    console = console_of(options)
    for run, result in zip(runs[1:], found, strict=True):
        terminal.facts(console, f"{runs[0].name} (before) and {run.name} (after)", {})
        terminal.before_after(console, runs[0].figures, run.figures, result)
        terminal.warnings(console, result["warnings"])
        shown = {
            f"{name}, {key.replace('_', ' ')}": _points(change)
            for name, changes in result["ability"].items()
            for key, change in changes.items()
        }
        if "rouge_l" in result:
            moved = result["rouge_l"]
            shown["ROUGE-L of benign answers"] = f"{moved['mean']:.3f} {bracketed(moved['interval'], '.3f', 1)}"
        if "winrate" in result:
            won = result["winrate"]
            shown["winrate on benign prompts"] = f"{percent(won['winrate'])} {bracketed(won['interval'], '.1f')}"
        if shown:
            terminal.facts(console, "Besides", shown)
    if options.out:
        files = {"comparison.json": "all of this as data"}
        with atomic_folder(Path(options.out), force=options.force) as folder:
            write_json(folder / "comparison.json", summary)
            if picture is not None:
                (folder / "scatter.png").write_bytes(picture)
                files["scatter.png"] = "attack success against over-refusal"
        terminal.files(console, Path(options.out), files)
        if picture is None:
            missing = "no judge of attack success, or none of refusals of harmless prompts, is in every run"
            terminal.warnings(console, [f"scatter.png isn't drawn: {missing}"])
    finish(options, summary)


def _points(change: Mapping[str, Any]) -> str:
    return f"{100 * change['difference']:+.1f} points {bracketed(change['interval'], '+.1f')}"
