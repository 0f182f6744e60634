"""The scatters of a report: before and after, and the strengths that were tried."""

from __future__ import annotations

import io
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from pke_fast import fronts
from pke_fast.evaluating.comparing import Run
from pke_fast.fronts import FIRST_TOKEN, before_after_png, strengths_png
from pke_fast.intervals import wilson


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are drawn."""
    found: list[Run] = []
    scatter = fronts.scatter_png

    def kept(runs: list[Run], *, dark: bool = False) -> bytes | None:
        found.extend(runs)
        return scatter(runs, dark=dark)

    monkeypatch.setattr(fronts, "scatter_png", kept)
    return found


def tried(strength: float, refused: int, held_refused: int, held: int = 40) -> dict[str, Any]:
    return {"strength": strength, "refused": refused, "unseen": 20, "held_refused": held_refused, "held": held}


def test_a_strength_is_a_point_of_both_sides(drawn: list[Run]) -> None:
    png = strengths_png([tried(1.0, 8, 0), tried(1.1, 15, 3)], 1.1)
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert [run.name for run in drawn] == ["1", "1.1, taken"]
    harmful, benign = drawn[1].figures["harmful"], drawn[1].figures["benign"]
    assert harmful["asr"] == {FIRST_TOKEN: 0.25}  # five of twenty don't begin as refusals
    assert harmful["intervals"]["asr"][FIRST_TOKEN] == list(wilson(5, 20))
    assert benign["refusal_rate"] == {FIRST_TOKEN: 3 / 40}
    assert benign["intervals"]["refusal_rate"][FIRST_TOKEN] == list(wilson(3, 40))


@pytest.mark.parametrize(("dark", "paper"), [(False, "#ffffff"), (True, "#1b1f24")])
def test_paper_is_that_of_the_page(dark: bool, paper: str) -> None:
    picture = imread(io.BytesIO(strengths_png([tried(1.0, 8, 0)], 1.0, dark=dark) or b""))
    assert to_hex(picture[0, 0]) == paper  # around the axes
    assert to_hex(picture[150, 600]) == paper  # within them


def test_without_harmless_prompts_no_strength_is_drawn() -> None:
    assert strengths_png([tried(1.0, 8, 0, held=0)], 1.0) is None
    assert strengths_png([], 1.0) is None


def test_before_and_after_are_drawn_where_both_sides_were_measured(drawn: list[Run]) -> None:
    def figures(asr: float) -> dict[str, Any]:
        sides = {"harmful": ("asr", asr), "benign": ("refusal_rate", 0.1)}
        return {
            side: {key: {"advbench": rate}, "intervals": {key: {"advbench": [0.0, 1.0]}}}
            for side, (key, rate) in sides.items()
        }

    assert before_after_png({"before": figures(0.9), "after": figures(0.2)}) is not None
    assert [(run.name, run.figures["harmful"]["asr"]["advbench"]) for run in drawn] == [("before", 0.9), ("after", 0.2)]
    for benign in (None, {"refusal_rate": {"advbench": 0.1}}):  # not measured; without its interval
        assert before_after_png({"before": figures(0.9), "after": {**figures(0.2), "benign": benign}}) is None
