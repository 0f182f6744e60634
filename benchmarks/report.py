"""README.md's table and the plots, made from what benchmarks/grid.py measured.

    python benchmarks/report.py [FILE.csv] [--check]

Without a file: the newest of benchmarks/results/tools-*.csv. The table stands in README.md between two markers and is
replaced there; the plots go beside the file. `--check` changes nothing and fails where the table is not the file's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # Python may have been told not to look beside a script
from results_csv import RESULTS, ROOT, read_rows

from pke_fast.errors import InputError

BEGIN, END = "<!-- benchmarks/report.py: begin -->", "<!-- benchmarks/report.py: end -->"
OURS, HOOKS = "pke_fast", "hooks"
SHARES = {0.5: "half", 0.2: "a fifth"}  # of the memory that hooks take, in which pke_fast's time is told
GROWING = ("tokens", "requests")  # suites whose largest size stands in the table
Rows = list[dict[str, str]]


def value(rows: Rows, suite: str, provider: str, metric: str, mode: str, x: str) -> float | None:
    """One median; None where it wasn't measured."""
    wanted = {"suite": suite, "provider": provider, "metric": metric, "mode": mode, "x": x}
    found = [row for row in rows if all(row[name] == text for name, text in wanted.items())]
    return float(found[-1]["median"]) if found else None


def distinct(rows: Iterable[dict[str, str]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


@dataclass(frozen=True)
class Figure:
    """What a tool took for a job: medians; None where that wasn't measured."""

    tool: str
    seconds: float | None
    peak: float | None
    how: str = ""

    @property
    def taken(self) -> str:
        parts = [self.how, _seconds(self.seconds), _bytes(self.peak)]
        return ", ".join(part for part in parts if part)


def table(rows: Rows) -> str:
    """Markdown: a line a job and other tool, with the ratios of pke_fast's figures to its, then where it was."""
    if not rows:
        raise InputError("there are no figures", do="run python benchmarks/grid.py first")
    jobs = [*_jobs(rows), *(job for share, words in SHARES.items() for job in _within(rows, share, words))]
    lines = ["| job | pke_fast | another tool | pke_fast's share of its time, of its memory |", "|---|---|---|---|"]
    for job, figures in [*jobs, *_whole(rows)]:
        ours = next((figure for figure in figures if figure.tool == OURS), Figure(OURS, None, None))
        for other in figures:
            if other is not ours:
                shares = [_ratio(ours.seconds, other.seconds), _ratio(ours.peak, other.peak)]
                shown = ", ".join(share for share in shares if share and other.seconds)
                lines.append(f"| {job} | {ours.taken} | {other.tool}: {other.taken} | {shown} |")
    where = rows[-1]
    note = f"{', '.join(distinct(rows, 'model'))}, {', '.join(distinct(rows, 'dtype'))}, {where['hardware']},"
    note += (
        f" {where['threads']} threads, torch {where['torch']}, transformers {where['transformers']}, {where['date']};"
    )
    return "\n".join([*lines, "", f"{note} medians; memory over the loaded model."])


Job = tuple[str, list[Figure]]


def _jobs(rows: Rows) -> list[Job]:
    """Tracing at the largest size that every tool has, by tokens and requests; every model's; every window's step."""
    cases = []
    for suite, mode in dict.fromkeys((row["suite"], row["mode"]) for row in rows if row["suite"] in GROWING):
        of = [row for row in rows if (row["suite"], row["mode"], row["metric"]) == (suite, mode, "seconds")]
        everyone = set(distinct(of, "provider"))
        shared = [x for x in distinct(of, "x") if {row["provider"] for row in of if row["x"] == x} == everyone]
        if shared:
            x = max(shared, key=int)
            cases.append((f"trace and score {int(x):,} {suite}, {mode}", suite, mode, x))
    for model, mode, x in dict.fromkeys((r["model"], r["mode"], r["x"]) for r in rows if r["suite"] == "size"):
        cases.append((f"trace and score {mode}, {model} with random weights", "size", mode, x))
    for mode in distinct((row for row in rows if row["suite"] == "step"), "mode"):
        x = next(row["x"] for row in rows if row["suite"] == "step" and row["mode"] == mode)
        cases.append((f"an edit step, hot spots in the {mode}", "step", mode, x))
    jobs = []
    for job, suite, mode, x in cases:
        of = [row for row in rows if (row["suite"], row["mode"], row["x"]) == (suite, mode, x)]
        figures = []
        for provider in distinct(of, "provider"):
            seconds, peak = (value(rows, suite, provider, metric, mode, x) for metric in ("seconds", "peak_bytes"))
            figures.append(Figure(provider, seconds, peak))
        jobs.append((job, figures))
    return jobs


def fastest(rows: Rows) -> dict[str, dict[str, str]]:
    """The row of each tool's fastest whole job, over its learning rates."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["suite"] == "whole" and row["metric"] == "seconds":
            before = found.get(row["provider"])
            if before is None or float(row["median"]) < float(before["median"]):
                found[row["provider"]] = row
    return found


def _whole(rows: Rows) -> list[Job]:
    """Each tool's fastest whole job."""
    whole = [row for row in rows if row["suite"] == "whole"]
    if not whole:
        return []
    best, figures = fastest(rows), []
    target = next(row["x"] for row in whole if row["x_name"] == "target")
    for provider in distinct(whole, "provider"):
        row = best.get(provider)
        peak = value(rows, "whole", provider, "peak_bytes", "two steps", target)
        seconds, how = (None, "not reached") if row is None else (float(row["median"]), row["mode"])
        figures.append(Figure(provider, seconds, peak, how))
    return [(f"locate and edit to a held-out loss of {target}", figures)]


def _within(rows: Rows, share: float, words: str) -> list[Job]:
    """Hooks at their fastest micro-batch; pke_fast at its fastest in at most a share of the memory they take there."""
    times = [row for row in rows if row["suite"] == "micro-batch" and row["metric"] == "seconds"]

    def taken(row: dict[str, str]) -> float:
        peak = value(rows, "micro-batch", row["provider"], "peak_bytes", row["mode"], row["x"])
        return float("inf") if peak is None else peak

    def best(provider: str, limit: float) -> dict[str, str] | None:
        fitting = [row for row in times if row["provider"] == provider and taken(row) <= limit]
        return min(fitting, key=lambda row: float(row["median"]), default=None)

    hooks = best(HOOKS, float("inf"))
    ours = best(OURS, share * taken(hooks)) if hooks else None
    if hooks is None or ours is None:
        return []
    figures = [
        Figure(row["provider"], float(row["median"]), taken(row), f"{int(row['x']):,} at once") for row in (ours, hooks)
    ]
    return [(f"trace and score {hooks['mode']}, pke_fast in {words} of hooks' memory", figures)]


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours is not None and theirs else ""


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g} s"


def _bytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def with_table(text: str, made: str) -> str:
    """A text with the table between its markers.

    Raises:
        InputError: it has no markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError("README.md has no place for the table", expected=f"the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def plots(rows: Rows, folder: Path, stem: str) -> list[Path]:
    """Time and memory against tokens, log-log, a line a tool; and time against memory, a point a micro-batch."""
    from matplotlib.figure import Figure

    paths = []
    for metric, label in (("seconds", "seconds"), ("peak_bytes", "bytes over the model")):
        of = [row for row in rows if row["suite"] == "tokens" and row["metric"] == metric]
        if of:
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.subplots()
            for mode, style in zip(distinct(of, "mode"), ("-", "--"), strict=False):
                _lines(axes, [row for row in of if row["mode"] == mode], style, mode)
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
            axes.legend(fontsize=6)
            paths.append(folder / f"{stem}-{metric.replace('_', '-')}.png")
            figure.savefig(paths[-1], dpi=150)
    front = [row for row in rows if row["suite"] == "micro-batch" and row["metric"] == "seconds"]
    if front:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for provider in distinct(front, "provider"):
            points = [
                (value(rows, "micro-batch", provider, "peak_bytes", row["mode"], row["x"]), float(row["median"]))
                for row in front
                if row["provider"] == provider
            ]
            seen = [(peak, time) for peak, time in points if peak]  # a tiny job's peak can be 0
            axes.plot([peak for peak, _ in seen], [time for _, time in seen], "o-", label=provider)
        axes.set(xscale="log", yscale="log", xlabel="bytes over the model", ylabel="seconds")
        axes.legend(fontsize=6)
        paths.append(folder / f"{stem}-front.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _lines(axes: object, rows: Rows, style: str, mode: str) -> None:
    for index, provider in enumerate(distinct(rows, "provider")):
        points = sorted((int(row["x"]), float(row["median"])) for row in rows if row["provider"] == provider)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, style, color=f"C{index}", marker=".", label=f"{provider}, {mode}")  # type: ignore[attr-defined]


def newest() -> Path:
    """The newest file of the grid, by the date in it.

    Raises:
        InputError: there is none.
    """
    files = [path for path in sorted(RESULTS.glob("tools-*.csv")) if read_rows(path)]
    if not files:
        raise InputError(f"no tools-*.csv in {RESULTS}", do="run python benchmarks/grid.py first")
    return max(files, key=lambda path: read_rows(path)[-1]["date"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    try:
        path = options.file or newest()
        rows = read_rows(path)
        text = readme.read_text(encoding="utf-8")
        wanted = with_table(text, table(rows))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        print("the table is the file's" if wanted == text else f"README.md's table is not that of {path}")
        return int(wanted != text)
    readme.write_text(wanted, encoding="utf-8")
    for plot in plots(rows, path.parent, path.stem):
        print(f"written: {plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
