"""What all pictures share: colours for a light and for a dark page, plain axes, PNG files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150


@dataclass(frozen=True)
class Palette:
    """Colours of a page: its paper and text; scores that weren't made, below zero, at it, above it; hot spots."""

    paper: str
    ink: str
    muted: str
    line: str
    unscored: str
    negative: tuple[str, str]
    zero: str
    positive: tuple[str, str]
    mark: str


# The same colours as the style sheet of report.html.j2.
LIGHT = Palette(
    "#ffffff", "#20252b", "#68707a", "#d9dcdf", "#e3e5e7", ("#7a5c2e", "#cfc0a4"), "#fafaf8", ("#9ccdc6", "#0b4f49"),
    "#d9480f",
)  # fmt: skip
DARK = Palette(
    "#1b1f24", "#e4e6e9", "#9aa3ad", "#363d45", "#2b3036", ("#d2b483", "#6b5a3c"), "#15181c", ("#256b64", "#a4e8de"),
    "#ff8a4c",
)  # fmt: skip


def plain_axes(axes: Axes, palette: Palette) -> None:
    """Two thin spines, and ticks and labels that stay behind what is drawn."""
    axes.tick_params(which="both", colors=palette.muted, labelsize=8.5, length=3, width=0.6)
    axes.xaxis.label.set(color=palette.muted, fontsize=9)
    axes.yaxis.label.set(color=palette.muted, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=palette.line, linewidth=0.8)


def png_of(figure: Figure) -> bytes:
    """The figure as a file; the same one gives the same bytes."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return out.getvalue()
