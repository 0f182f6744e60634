"""Untrusted texts on a console: never read as markup, and without what steers a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

_WIDEST = 120
_DIRECTION_MARKS = dict.fromkeys(
    (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
)  # they can reorder what is around them
_ASCII = str.maketrans({"–": "-", "→": "->", "…": "...", "█": "#", "│": "|"})


def heading(console: Console, title: str) -> None:
    """A title, after an empty line."""
    console.print()
    show_text(console, title, style="bold cyan")


def new_table(*columns: tuple[str, str]) -> Table:
    """An empty table; columns are a title and left or right. What isn't trusted goes into it as `safe_text`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", pad_edge=True)
    for title, side in columns:
        table.add_column(title, justify="left" if side == "left" else "right", overflow="fold")
    return table


def show_table(console: Console, table: Table, indent: int = 1) -> None:
    """A table, moved to the right by `indent`."""
    console.print(Padding(table, (0, 0, 0, indent), expand=False))


def show_pairs(console: Console, found: Mapping[str, Any], indent: int) -> None:
    """Labels and values, a pair a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for key, value in found.items():
        table.add_row(safe_text(console, key), safe_text(console, _value(value)))
    show_table(console, table, indent)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_text(console: Console, text: str, *, indent: int = 0, style: str = "", soft_wrap: bool = False) -> None:
    """A text; with `soft_wrap` the terminal breaks it, so that it can be copied whole."""
    if soft_wrap:
        console.print(Text(" " * indent).append_text(safe_text(console, text, style=style)), soft_wrap=True)
    else:
        width = max(20, min(console.width, _WIDEST) - indent)
        for line in safe_text(console, text).wrap(console, width):
            line.rstrip()
            console.print(Text.assemble(" " * indent, (line.plain, style)), no_wrap=True, overflow="ignore", crop=False)


def one_line(text: str) -> str:
    """A text on one line, without repeated spaces."""
    return " ".join(str(text).split()) or "(empty)"


def half_width(console: Console) -> int:
    """How wide each of two texts side by side is."""
    return max(8, (min(console.width, _WIDEST) - 7) // 2)


def wrapped(console: Console, text: str, width: int, most: int | None = None) -> list[Text]:
    """A text as lines of that width; of too many lines the rest is cut off, and an ellipsis says so."""
    lines = list(safe_text(console, text.strip() or "(empty)").wrap(console, width))
    if most is None or len(lines) <= most:
        return lines
    ellipsis = safe(console, " …")
    last = lines[most - 1]
    last.rstrip()
    last.truncate(width - len(ellipsis))
    return [*lines[: most - 1], last.append(ellipsis)]


def side_by_side(console: Console, left: Sequence[Text], right: Sequence[Text], style: str = "") -> None:
    """Two texts in lines (`wrapped`), with a bar between them."""
    width, bar = half_width(console), safe(console, " │ ")
    for index in range(max(len(left), len(right))):
        first, second = (side[index].copy() if index < len(side) else Text() for side in (left, right))
        first.rstrip()
        second.rstrip()
        first.pad_right(width - first.cell_len)
        line = Text.assemble("    ", first, (bar, "dim"), second, style=style)
        line.rstrip()
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def safe_text(console: Console, value: object, style: str = "") -> Text:
    """Untrusted text for a console: no markup is read in it, and it holds nothing that steers a terminal."""
    return Text(safe(console, str(value)), style=style)


def safe(console: Console, text: str) -> str:
    """A text without what steers a terminal or reorders its surroundings, in what the console can encode."""
    text = text.translate(_DIRECTION_MARKS).expandtabs(4)
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs"))
    if console.options.ascii_only:
        text = text.translate(_ASCII)
    return text.encode(console.encoding, "replace").decode(console.encoding)
