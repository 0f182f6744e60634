"""Pictures for the report: the scores of all neurons as a heatmap with the hot spots, and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Swatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pke_fast.drawing import DARK, DPI, LIGHT, Palette, plain_axes, png_of
from pke_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

MAX_COLUMNS = 512  # about two and a half pixels a column at the picture's width
_WIDTH = 9.6  # inches, which the report shows about 970 pixels wide
_ROBUST = 99.5  # percentile of the absolute scores at which the colours saturate


def heatmap_png(
    score_map: Tensor | NDArray[Any],
    window: Sequence[int],
    hot_spots: Mapping[int, Sequence[int]],
    *,
    dark: bool = False,
) -> bytes:
    """The scores as a picture: layers upwards, neurons to the right, hot spots marked and counted by layer.

    Neighbouring neurons share a column where there are more than 512, which then shows the highest of their scores.

    Args:
        score_map: [L, D], any float dtype, any device. NaN: not scored, drawn grey.
        window: ``(first, last + 1)``, the layers in which hot spots were sought.
        hot_spots: neurons by layer.
        dark: colours for a dark page.

    Returns:
        A PNG file; the same input gives the same bytes.

    Raises:
        InputError: a map that isn't [L, D], or a hot spot outside of it.
    """
    scores = _as_array(score_map)
    layers, neurons = scores.shape
    binned, edges = _binned(scores)
    marks = _marks(hot_spots, layers, neurons, edges)
    palette = DARK if dark else LIGHT

    body = min(max(0.15 * layers, 1.7), 8.0)  # inches
    top, bottom = 0.5, 1.3
    width, height = _WIDTH, body + top + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=palette.paper)

    def place(left: float, low: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, low / height, wide / width, high / height), facecolor=palette.paper)

    heat = place(0.62, bottom, 7.0, body)
    _draw_heat(heat, place(0.62, 0.42, 2.4, 0.11), binned, neurons, palette)
    heat.scatter(*marks, s=min(9.0, max(1.6, 2400 / max(1, len(marks[0])))), c=palette.mark, linewidths=0, zorder=3)
    counts = place(7.76, bottom, 1.6, body)
    _draw_counts(counts, hot_spots, layers, palette)
    for axes in (heat, counts):
        axes.set_ylim(-0.5, layers - 0.5)
        for border in (window[0] - 0.5, window[1] - 0.5):
            axes.axhline(border, color=palette.ink, linewidth=0.9, linestyle=(0, (5, 3)), zorder=4, clip_on=False)
    total = sum(len(ids) for ids in hot_spots.values())
    heat.set_title(f"Score of each neuron; {total:,} hot spots", loc="left", fontsize=11, color=palette.ink, pad=9)
    counts.set_title("Hot spots by layer", loc="left", fontsize=9.5, color=palette.ink, pad=9)
    _legend(figure, window, total > 0, bool(np.isnan(scores).any()), palette)
    return png_of(figure)


def learning_curve_png(steps: Sequence[Mapping[str, Any]], stopped: str | None = None, *, dark: bool = False) -> bytes:
    """Edit loss and KL of every step, side by side; an axis whose values span a factor of 20 is logarithmic.

    Args:
        steps: dicts with ``step``, ``edit`` and ``kl``, losses in nats per token; None is left out.
        stopped: why the edit stopped; written at the last step.
        dark: colours for a dark page.

    Returns:
        A PNG file; the same input gives the same bytes.
    """
    palette = DARK if dark else LIGHT
    figure = Figure(figsize=(_WIDTH, 3.1), dpi=DPI, facecolor=palette.paper)
    at = [int(step["step"]) for step in steps]
    panels = (("edit", "Loss of the safe answers", palette.positive[1]),
              ("kl", "KL from what the steps hold, on harmless prompts", palette.negative[0]))  # fmt: skip
    for column, (key, title, colour) in enumerate(panels):
        axes = figure.add_axes((0.068 + 0.5 * column, 0.2, 0.42, 0.64), facecolor=palette.paper)
        values = np.array([np.nan if step.get(key) is None else float(step[key]) for step in steps])
        seen = values[np.isfinite(values)]
        positive = seen[seen > 0]
        if len(positive) and positive.max() > 20 * positive.min():
            axes.set_yscale("log")
            wide = positive.max() > 1000 * positive.min()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _at: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            values = np.where(values > 0, values, np.nan)  # an unedited model's KL is 0 and has no logarithm
        axes.plot(at, values, color=colour, linewidth=1.6, marker="o", markersize=3.2 if len(at) < 80 else 0)
        axes.set_title(title, loc="left", fontsize=10.5, color=palette.ink, pad=8)
        axes.set_xlabel("step", fontsize=9, color=palette.muted)
        axes.set_ylabel("nats per token" + (", log scale" if axes.get_yscale() == "log" else ""), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(axis="y", color=palette.line, linewidth=0.6)
        axes.margins(x=0.03, y=0.12)
        plain_axes(axes, palette)
        if stopped and at:
            axes.axvline(at[-1], color=palette.mark, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"stopped after step {at[-1]}", (at[-1], 1), xycoords=("data", "axes fraction"), xytext=(-5, -3),
                textcoords="offset points", ha="right", va="top", fontsize=8.5, color=palette.mark,
            )  # fmt: skip
    return png_of(figure)


def _as_array(score_map: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    if not isinstance(score_map, np.ndarray):
        score_map = score_map.detach().double().cpu().numpy()
    if score_map.ndim != 2 or 0 in score_map.shape:
        raise InputError("a score map can't be drawn", expected="shape [layers, neurons]", got=str(score_map.shape))
    return np.asarray(score_map, dtype=np.float64)


def _binned(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The highest score of each bin of neighbours, [L, at most 512], and the first neuron of each bin."""
    neurons = scores.shape[1]
    columns = min(neurons, MAX_COLUMNS)
    edges = np.arange(columns, dtype=np.int64) * neurons // columns
    return np.fmax.reduceat(scores, edges, axis=1), edges  # fmax: NaN only where all are


def _marks(
    hot_spots: Mapping[int, Sequence[int]], layers: int, neurons: int, edges: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Where to put the marks: the middle of the column that holds the neuron, and the layer."""
    pairs = [(layer, neuron) for layer, ids in hot_spots.items() for neuron in ids]
    for layer, neuron in pairs:
        if not (0 <= layer < layers and 0 <= neuron < neurons):
            raise InputError(
                "a hot spot is outside of the score map",
                expected=f"layers below {layers}, neurons below {neurons}",
                got=f"layer {layer}, neuron {neuron}",
            )
    at = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    column = np.searchsorted(edges, at[:, 1], side="right") - 1
    return (column + 0.5) * neurons / len(edges), at[:, 0]


def _draw_heat(axes: Axes, bar: Axes, binned: NDArray[np.float64], neurons: int, palette: Palette) -> None:
    finite = binned[np.isfinite(binned)]
    high = float(np.percentile(np.abs(finite), _ROBUST)) if len(finite) else 1.0
    high = high or float(np.abs(finite).max()) or 1.0
    signed = bool(len(finite)) and finite.min() < 0
    low = -high if signed else 0.0
    shades = [palette.zero, *palette.positive]
    shaded = LinearSegmentedColormap.from_list("scores", [*palette.negative, *shades] if signed else shades)
    colours = shaded.with_extremes(bad=palette.unscored)
    # By the square root: a few neurons score far above the rest, which a linear scale would make invisible.
    norm = FuncNorm((lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * v**2), vmin=low, vmax=high)
    image = axes.imshow(
        np.ma.masked_invalid(np.clip(binned, low, high)), aspect="auto", origin="lower", interpolation="nearest",
        extent=(0, neurons, -0.5, len(binned) - 0.5), cmap=colours, norm=norm,
    )  # fmt: skip
    axes.set_xlabel(
        "neuron" + (f" (highest of {neurons / binned.shape[1]:.3g} a column)" if neurons > MAX_COLUMNS else "")
    )
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(12, max(2, len(binned)))))
    plain_axes(axes, palette)
    if not len(finite):
        bar.set_axis_off()
        return
    ticks = [-high, -high / 4, 0.0, high / 4, high] if signed else [0.0, high / 16, high / 4, high]
    scale = bar.figure.colorbar(image, cax=bar, orientation="horizontal", ticks=ticks)
    scale.ax.set_xticklabels([f"{tick:.2g}" for tick in ticks])
    scale.ax.tick_params(labelsize=8, colors=palette.muted, length=0)
    scale.minorticks_off()
    scale.outline.set_visible(False)
    bar.set_title("score (square-root scale)", loc="left", fontsize=8.5, color=palette.muted, pad=3)


def _draw_counts(axes: Axes, hot_spots: Mapping[int, Sequence[int]], layers: int, palette: Palette) -> None:
    counts = [len(hot_spots.get(layer, ())) for layer in range(layers)]
    most = max(counts) or 1
    axes.barh(range(layers), counts, height=0.72, color=palette.mark, linewidth=0)
    axes.set_xlim(0, most * 1.3)
    if layers <= 50:
        for layer, count in enumerate(counts):
            if count:
                axes.text(count + most * 0.04, layer, f"{count:,}", va="center", fontsize=7, color=palette.muted)
    axes.set_xlabel("neurons")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    axes.set_yticks([])
    plain_axes(axes, palette)


def _legend(figure: Figure, window: Sequence[int], marked: bool, unscored: bool, palette: Palette) -> None:
    handles: list[Line2D | Swatch] = []
    if marked:
        handles.append(Line2D([], [], color=palette.mark, marker="o", markersize=4, linewidth=0, label="hot spot"))
    label = f"window: layers {window[0]} to {window[1] - 1}"
    handles.append(Line2D([], [], color=palette.ink, linewidth=0.9, linestyle=(0, (5, 3)), label=label))
    if unscored:
        handles.append(Swatch(facecolor=palette.unscored, edgecolor=palette.line, label="not scored"))
    figure.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(0.985, 0.1 / figure.get_figheight()), ncols=len(handles),
        frameon=False, fontsize=8.5, labelcolor=palette.muted, handlelength=1.8, columnspacing=1.6,
    )  # fmt: skip
