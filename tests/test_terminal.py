"""What is printed: complete, within the width, plain where it isn't a terminal, never read as markup."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pke_fast import terminal

HOSTILE = "[bold red]pwned[/bold red] \x1b[31mred\x1b[0m \x07 :smile: \u202eabc [link=x]y"
SHOWN = "[bold red]pwned[/bold red] [31mred[0m :smile: abc [link=x]y"


def figures(asr: float, refused: float) -> dict[str, Any]:
    return {
        "harmful": {"n": 20, "asr": {"advbench": asr}, "degenerate_rate": 0.0},
        "benign": {"n": 40, "refusal_rate": {"advbench": refused}, "degenerate_rate": 0.0},
        "text": {"perplexity": 20.0},
        "settings": {},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    kinds = ("harmful", "harmful", "harmful", "harmful", "benign")
    return {
        "model": {"name": "tiny", "layers": 4, "neurons_per_layer": 40},
        "hot_spots": {"k": 5, "share": 5 / 160, "window": [1, 4], "by_layer": {"1": 2, "3": 3}},
        "losses": {"before": {"edit": 3.0, "kl": 0.0}, "after": {"edit": 0.5, "kl": 0.01}, "stopped": "all steps done"},
        "stages": [
            {"name": "Scoring", "seconds": 2.0, "peak_bytes": 3 << 20, "over_bytes": 1 << 20},
            {"name": "Editing", "seconds": 75.0, "peak_bytes": None, "over_bytes": None},
        ],
        "warnings": ["THE EDIT DID NOTHING"],
        "evaluation": {"before": figures(0.95, 0.0), "after": figures(0.05, 0.025)},
        "samples": [
            {"kind": kind, "prompt": f"Prompt {i}", "before": f"OLD{i} " + "word " * 200, "after": f"NEW{i}"}
            for i, kind in enumerate(kinds)
        ],
        "files": {"patch.safetensors": "the changed neurons"},
    }


class Encoded(io.StringIO):
    encoding = "ascii"


def console(width: int = 80, file: io.StringIO | None = None, **kwargs: Any) -> Console:
    return Console(file=file or io.StringIO(), width=width, **kwargs)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_summary_fits_and_is_complete(report: dict[str, Any], width: int) -> None:
    target = console(width)
    terminal.edit_summary(target, report, Path("out"))
    text = printed(target)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines() if "pke-fast" not in line)
    titles = [
        "Before and after",
        "Harmful prompts",
        "Content warning",
        "Harmless prompts",
        "Hot spots by layer",
        "Time and memory",
        "Files",
        "Use it",
        "The same with your own model",
        "WARNING: THE EDIT DID NOTHING",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    for expected in ("95.0 %", "5.0 %", "-90.0 points", "1 min 15 s", "patch.safetensors", "NEW4"):
        assert expected in text
    again = console(width)
    terminal.edit_summary(again, report, Path("out"))
    assert printed(again) == text


def test_commands_are_not_broken_into_lines(report: dict[str, Any]) -> None:
    target = console(40)
    terminal.next_steps(target, "my model", Path("some/folder/with a name"))
    lines = printed(target).splitlines()
    assert "    pke-fast chat --model 'my model' --patch 'some/folder/with a name/patch.safetensors'" in lines


def test_answers_are_cut_side_by_side_and_three_of_a_kind(report: dict[str, Any]) -> None:
    target = console(80)
    terminal.answers(target, report["samples"])
    text = printed(target)
    assert "Prompt 2" in text
    assert "Prompt 3" not in text
    assert "Prompt 4" in text
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "OLD0" in line)
    assert lines[first].endswith("│ NEW0")
    assert lines[first + 3].rstrip(" │").endswith("…")
    assert lines[first + 4] == ""


def test_redaction_hides_harmful_answers_only(report: dict[str, Any]) -> None:
    target = console()
    terminal.answers(target, report["samples"], redact=True)
    text = printed(target)
    assert "OLD0" not in text
    assert "NEW0" not in text
    assert text.count("[redacted]") == 6
    assert "NEW4" in text


def test_hostile_text_is_shown_as_it_is(report: dict[str, Any]) -> None:
    report["samples"] = [{"kind": "benign", "prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}]
    report["model"]["name"] = report["losses"]["stopped"] = report["stages"][0]["name"] = HOSTILE
    report["warnings"], report["files"], report["evaluation"] = [HOSTILE], {HOSTILE: HOSTILE}, None
    target = console(400)
    terminal.edit_summary(target, report, Path(HOSTILE))
    terminal.exchange(target, HOSTILE, HOSTILE, HOSTILE)
    terminal.facts(target, HOSTILE, {HOSTILE: [HOSTILE, {"a": HOSTILE}]})
    text = printed(target)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert text.count("[bold red]pwned[/bold red]") >= 15
    assert f"WARNING: {SHOWN.replace('[0m ', '[0m  ')}" in text


def test_hostile_text_steers_no_terminal_either() -> None:
    target = console(200, force_terminal=True, color_system="standard")
    terminal.exchange(target, "p", HOSTILE)
    assert "\x1b[31m" not in printed(target)
    assert "\x07" not in printed(target)


def test_a_console_of_ascii_gets_ascii(report: dict[str, Any]) -> None:
    report["samples"][4]["after"] = "naïve → 日本"
    target = console(80, Encoded())
    terminal.edit_summary(target, report, Path("out"))
    text = printed(target)
    assert text.isascii()
    assert "na?ve -> ??" in text
    assert "####" in text


def test_hot_spot_bars_are_in_proportion(report: dict[str, Any]) -> None:
    report["hot_spots"]["by_layer"] = {"1": 20, "3": 40}
    target = console(120)
    terminal.hot_spots(target, report)
    lines = printed(target).splitlines()
    bars = {line.split()[0]: line for line in lines if line.strip()[:1].isdigit() and "neurons" not in line}
    assert list(bars) == ["3", "2", "1"]
    assert [bars[layer].count("█") for layer in bars] == [60, 0, 30]
    assert bars["3"].endswith(" 40")


def test_stages_have_a_total_and_a_highest_peak(report: dict[str, Any]) -> None:
    target = console()
    terminal.stages(target, report["stages"])
    last = printed(target).rstrip().splitlines()[-1].split()
    assert last == ["all", "1", "min", "17", "s", "3", "MiB", "1", "MiB"]


def test_absent_parts_are_left_out(report: dict[str, Any]) -> None:
    report |= {"evaluation": None, "samples": [], "stages": [], "files": {}, "warnings": []}
    target = console()
    terminal.edit_summary(target, report, Path("out"))
    text = printed(target)
    for title in ("Before and after", "prompts:", "Time and memory", "Files", "WARNING"):
        assert title not in text
    assert "Losses in nats per token" in text


def test_one_evaluation() -> None:
    target = console()
    terminal.evaluation(target, {**figures(0.25, 0.1), "text": None})
    text = printed(target)
    assert "25.0 %" in text
    assert "change" not in text
    assert "perplexity" not in text


def test_exchange_shows_whole_answers() -> None:
    target = console()
    terminal.exchange(target, "Hi", "one\n\ntwo", "word " * 100)
    text = printed(target)
    assert text.count("word") == 100
    assert text.index("one") < text.index("two")
    alone = console()
    terminal.exchange(alone, "Hi", "")
    assert printed(alone).splitlines()[1:] == ["Hi", "  (empty)"]


def test_patch_and_doctor() -> None:
    part = {"layer": 3, "axis": 1, "neurons": 1200, "width": 8, "relative_change": 0.125}
    layers = [{**part, "projection": kind, "weight": f"l.3.w{index}"} for index, kind in enumerate(("up", "down"))]
    target = console()
    terminal.patch(
        target, {"method": "pke", "neurons": 1200, "dtype": "fp32", "layers": layers, "base": {"name": "tiny"}}
    )
    assert "12.5 %" in printed(target)
    assert "tiny" in printed(target)
    shown = [line.split() for line in printed(target).splitlines() if "l.3.w" in line]
    assert [line[:3] for line in shown] == [["3", "up", "l.3.w0"], ["3", "down", "l.3.w1"]]
    target = console()
    terminal.doctor(target, {"versions": {"torch": "2.x"}, "devices": ["cuda:0 A", "cpu"], "cache": "~/c"})
    assert "cuda:0 A, cpu" in printed(target)
    assert "Versions" in printed(target)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, ""),
        ({"gain": 0.0, "strength": 1.0}, ""),
        ({"gain": 0.0, "strength": 1.5}, "; strength 1.5"),
        ({"gain": 0.125, "strength": 1.0}, "; detectors' gain 0.125"),
        ({"gain": 0.5, "strength": 3.0}, "; detectors' gain 0.5; strength 3"),
    ],
)
def test_the_gain_and_the_strength_are_told_where_there_are_any(
    found: dict[str, float], told: str, report: dict[str, Any]
) -> None:
    target = console(width=120)
    terminal.losses(target, report["losses"] | found)
    assert printed(target).rstrip().endswith(f"Stopped: all steps done{told}")
