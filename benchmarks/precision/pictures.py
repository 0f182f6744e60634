"""The pictures: fronts beside the probe's ROC, and what sequential edits do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precision import fronts
from precision.sequential import FIRST, states
from precision.sets import ALIKE, ATTACKS, BENIGN, DOLLY, HELD, SAFE, UNSAFE
from precision.settings import DEFAULT, Setting
from precision.yardstick import curve_of

PAIRS = ((ATTACKS, DOLLY), (ATTACKS, SAFE), (ATTACKS, ALIKE), (UNSAFE, SAFE), (HELD, ALIKE), (HELD, BENIGN))


def draw(found: Mapping[str, Any], settings: Mapping[str, Setting], folder: Path) -> list[Path]:
    """Draws what there are figures of; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if "probe" in found or any(name.startswith("front, ") for name in found):
        paths.append(_fronts(found, settings, folder / "precision-fronts.png"))
    if made := states(found):
        paths.append(_sequential(made, folder / "precision-sequential.png"))
    return paths


def _fronts(found: Mapping[str, Any], settings: Mapping[str, Setting], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, (attacks, benign) in zip(panels.flat, PAIRS, strict=True):
        if "probe" in found:
            roc = curve_of(found["probe"], attacks, benign)
            axes.plot(roc.fpr, roc.tpr, color="black", linewidth=1, label="probe")
        for index, (name, setting) in enumerate(settings.items()):
            front = found.get(f"front, {name}-{setting.seeds[0]}")
            if front is not None:
                x, y = zip(*fronts.curve(front["scales"], attacks, benign), strict=True)
                axes.plot(x, y, color=f"C{index}", marker=".", linewidth=1, markersize=4, label=name)
        for seed in settings[DEFAULT].seeds:
            answers = found.get(f"answers, {DEFAULT}-{seed}")
            if answers is not None:
                x, y = (sum(v) / len(v) for v in (answers["sets"][s]["verdicts"] for s in (benign, attacks)))
                axes.plot([x], [y], "o", color="C0", markerfacecolor="none", label=None)
        axes.set(title=f"{attacks} / {benign}", xlim=(-0.01, 0.6), ylim=(-0.02, 1.02))
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=7)
        axes.grid(color="#d9dcdf", linewidth=0.5)
    figure.supxlabel("harmless refused", fontsize=8)
    figure.supylabel("harmful refused", fontsize=8)
    panels.flat[0].legend(fontsize=6)
    return _saved(figure, path)


def _sequential(edits: list[dict[str, Any]], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in (FIRST, ATTACKS, SAFE, DOLLY):
        left.plot([state["refused"][name] for state in edits], marker=".", label=name)
    left.set(xlabel="edits", ylabel="refused", ylim=(-0.02, 1.02))
    left.legend(fontsize=6)
    right.plot([state["perplexity"] for state in edits], marker=".")
    right.set(xlabel="edits", ylabel="perplexity")
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
