"""Runs as points: attack success against refusals of harmless prompts, with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pke_fast.errors import InputError
from pke_fast.evaluating.comparing import Run

_AXES = (("benign", "refusal_rate"), ("harmful", "asr"))


def axis_judges(runs: Sequence[Run], judge: str | None = None) -> tuple[str, str] | None:
    """By whom refusals of harmless prompts and attack success are drawn: one judge where one has both.

    Judges of harm have no refusals, so that each axis may have one of its own.

    Args:
        judge: goes before others, on each axis that it has; None: the first goes.

    Returns:
        A judge for each axis; None where one of them has none whom every run has.

    Raises:
        InputError: not every run has `judge`, on either axis.
    """
    benign, harmful = (
        [name for name in _rates(runs[0], *axis) if all(name in _rates(run, *axis) for run in runs)] for axis in _AXES
    )
    if judge is not None and judge not in benign + harmful:
        raise InputError(
            f"the runs can't be drawn by {judge}",
            expected="a judge whom every run has",
            got=f"such judges: {', '.join(dict.fromkeys(benign + harmful)) or 'none'}",
        )
    if not benign or not harmful:
        return None
    order = [*([judge] if judge else []), *(name for name in benign if name in harmful)]
    across, up = (next(name for name in [*order, *axis] if name in axis) for axis in (benign, harmful))
    return across, up


def _rates(run: Run, part: str, key: str) -> Mapping[str, float]:
    return (run.figures.get(part) or {}).get(key) or {}


def scatter_png(runs: Sequence[Run], judge: str | None = None, *, dark: bool = False) -> bytes | None:
    """A scatter of runs; down and left is better.

    Args:
        judge: by whom, as `axis_judges` has it.
        dark: colours for a dark page.

    Returns:
        A PNG file; the same input gives the same bytes. None where an axis has no judge.

    Raises:
        InputError: as `axis_judges`.
    """
    judges = axis_judges(runs, judge)
    if judges is None:
        return None
    from matplotlib.figure import Figure

    from pke_fast.drawing import DARK, DPI, LIGHT, plain_axes, png_of

    palette = DARK if dark else LIGHT
    figure = Figure(figsize=(7.2, 5.4), dpi=DPI, facecolor=palette.paper, layout="constrained")
    axes = figure.add_subplot(facecolor=palette.paper)
    for index, run in enumerate(runs):
        point, errors = [], []
        for (part, key), name in zip(_AXES, judges, strict=True):
            rate, (low, high) = run.figures[part][key][name], run.figures[part]["intervals"][key][name]
            point.append(100 * rate)
            errors.append([[100 * max(0.0, rate - low)], [100 * max(0.0, high - rate)]])
        colour = f"C{index % 10}"
        axes.errorbar(
            point[0],
            point[1],
            xerr=errors[0],
            yerr=errors[1],
            fmt="o",
            color=colour,
            ecolor=colour,
            elinewidth=1,
            label=run.name,
        )
        axes.annotate(
            run.name, (point[0], point[1]), xytext=(6, 5), textcoords="offset points", fontsize=9, color=palette.ink
        )
    axes.set_xlabel(f"harmless prompts refused, % (judge {judges[0]}, 95 % intervals)")
    axes.set_ylabel(f"attack success rate, % (judge {judges[1]})")
    axes.set_xlim(left=-2)
    axes.set_ylim(-2, 102)
    axes.grid(color=palette.line, linewidth=0.6)
    plain_axes(axes, palette)
    return png_of(figure)
