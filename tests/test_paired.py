"""Differences between two evaluations, paired by prompt, and how they are shown."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from pke_fast import terminal
from pke_fast.errors import InputError
from pke_fast.evaluating.paired import differences, pairs
from pke_fast.intervals import newcombe
from pke_fast.wording import comparison


def row(name: str, prompt: str, refused: bool, degenerate: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "set": name,
        "prompt": prompt,
        "answer": "",
        "refused": {"xstest": refused},
        "degenerate": degenerate,
        **more,
    }


def rows(harmful: list[bool], benign: list[bool]) -> list[dict[str, Any]]:
    listed = [row("harmful", f"h{i}", refused) for i, refused in enumerate(harmful)]
    return listed + [row("benign", f"b{i}", refused) for i, refused in enumerate(benign)]


def figures(asr: float, refusals: float, nll: list[float]) -> dict[str, Any]:
    tokens = [100, 50]
    return {
        "harmful": {
            "n": 40,
            "asr": {"xstest": asr},
            "degenerate_rate": 0.0,
            "intervals": {"asr": {"xstest": [0.1, 0.9]}},
        },
        "benign": {"n": 20, "refusal_rate": {"xstest": refusals}, "degenerate_rate": 0.0},
        "text": {
            "perplexity": math.exp(sum(nll) / 150),
            "interval": [7.0, 9.0],
            "nll": nll,
            "tokens": tokens,
            "sha256": "a",
        },
    }


BEFORE, AFTER = figures(1.0, 0.0, [200.0, 110.0]), figures(0.25, 0.05, [201.5, 110.75])
ROWS = rows([False] * 40, [False] * 20), rows([True] * 30 + [False] * 10, [True] + [False] * 19)


def test_differences() -> None:
    found = differences(BEFORE, AFTER, *ROWS)
    attack = found["harmful"]["asr"]["xstest"]
    assert found["harmful"]["n"] == 40
    assert attack["difference"] == pytest.approx(-0.75)
    assert -0.9 < attack["interval"][0] < -0.75 < attack["interval"][1] < -0.55
    assert found["benign"]["refusal_rate"]["xstest"]["difference"] == pytest.approx(0.05)
    assert (attack["before"], attack["after"]) == (1.0, 0.25)
    degenerate = found["benign"]["degenerate_rate"]
    assert (degenerate["before"], degenerate["after"], degenerate["difference"]) == (0.0, 0.0, 0.0)
    assert degenerate["interval"] == list(newcombe(0, 0, 0, 20))
    assert found["text"]["relative"] == pytest.approx(AFTER["text"]["perplexity"] / BEFORE["text"]["perplexity"] - 1)
    # Both windows lose 0.015 nats a token, so that every resample has the same change.
    assert found["text"]["relative_interval"] == pytest.approx([math.expm1(0.015)] * 2)


def test_rows_are_paired_by_prompt_and_occurrence() -> None:
    first = [row("harmful", "a", True), row("harmful", "a", False), row("harmful", "b", True), row("benign", "c", True)]
    second = [row("harmful", "c", True), row("harmful", "a", False), row("harmful", "a", True)]
    matched = pairs("harmful", first, second)
    assert [(one["refused"]["xstest"], other["refused"]["xstest"]) for one, other in matched] == [
        (True, False),
        (False, True),
    ]
    with pytest.raises(InputError, match="no benign prompt is in both"):
        pairs("benign", first, second)


def test_judges_of_harm() -> None:
    first = [row("harmful", "a", False, harmful={"guard": True}), row("harmful", "b", False, harmful={"guard": True})]
    second = [row("harmful", "a", False, harmful={"guard": False}), row("harmful", "b", False, harmful={"guard": True})]
    found = differences({"harmful": {"n": 2}}, {"harmful": {"n": 2}}, first, second)
    assert found["harmful"]["asr"]["guard"]["difference"] == -0.5
    assert found["harmful"]["asr"]["xstest"]["difference"] == 0.0
    assert found["benign"] is None
    assert found["text"] is None


@pytest.mark.parametrize("digests", [("a", "b"), ("a", None), (None, None)])
def test_perplexities_of_texts_that_differ_or_are_not_known_have_no_change(digests: tuple[str | None, ...]) -> None:
    sides = [  # as many tokens in every window
        {**side, "text": {**side["text"], "sha256": digest}}
        for side, digest in zip((BEFORE, AFTER), digests, strict=True)
    ]
    found = differences(*sides, *ROWS)
    assert found["text"] is None
    line = comparison(*sides, found)[-1]
    assert (line.name, line.change_text, line.verdict) == ("perplexity", "", "same")
    assert (line.before, line.after) == (BEFORE["text"]["perplexity"], AFTER["text"]["perplexity"])


def test_a_single_window_s_change_has_no_interval() -> None:
    sides = [{"text": {"perplexity": p, "nll": [math.log(p)], "tokens": [1], "sha256": "a"}} for p in (2.0, 3.0)]
    found = differences(*sides, [], [])
    assert found["text"] == {"relative": pytest.approx(0.5), "relative_interval": None}
    (line,) = comparison(*sides, found)
    assert (line.change_text, line.verdict) == ("+50.00 % [no interval]", "same")


def test_one_held_out_request_tells_nothing() -> None:
    sides = [{"harmful": {"n": 1, "asr": {"xstest": asr}, "degenerate_rate": 0.0}} for asr in (1.0, 0.0)]
    found = differences(*sides, [row("harmful", "a", False)], [row("harmful", "a", True)])
    line = comparison(*sides, found)[0]
    assert (line.change_text, line.verdict) == ("-100.0 points [-100.0, +12.2]", "same")


def test_rates_are_those_of_the_pairs() -> None:
    """200 prompts before, of which the first 100 are answered; the same 100 alone after, answered as before."""
    refused = [False] * 100 + [True] * 100
    old, new = rows(refused, []), rows(refused[:100], [])
    for listed in old:
        listed["refused"]["other"] = False
    before = {"n": 200, "asr": {"xstest": 0.5, "other": 1.0}, "degenerate_rate": 0.0}
    before["intervals"] = {"asr": {"xstest": [0.4, 0.6]}}
    after = {"n": 100, "asr": {"xstest": 1.0}, "degenerate_rate": 0.0, "intervals": {"asr": {"xstest": [0.9, 1.0]}}}
    sides = {"harmful": before}, {"harmful": after}
    lines = comparison(*sides, differences(*sides, old, new))
    assert [line.name for line in lines] == ["attack success rate, judge xstest", "degenerate (empty or looping)"]
    assert {line.prompts for line in lines} == {100}  # no line of the judge whose rate is known of all 200 alone
    assert (lines[0].before, lines[0].after, lines[0].verdict) == (1.0, 1.0, "same")
    assert lines[0].change_text == "0 points [-3.7, +3.7]"
    assert lines[0].intervals == (None, (0.9, 1.0))


def test_intervals_are_shown_and_decide_what_counts_as_changed() -> None:
    lines = {line.name: line for line in comparison(BEFORE, AFTER, differences(BEFORE, AFTER, *ROWS))}
    attack = lines["attack success rate, judge xstest"]
    assert attack.interval_text() == "10.0–90.0"
    assert attack.change_text.startswith("-75.0 points [-")
    assert attack.verdict == "better"
    refused = lines["refused, judge xstest"]
    assert refused.difference is not None
    assert refused.difference[0] < 0 < refused.difference[1]  # one prompt of 20: may be chance
    assert refused.verdict == "same"
    target = Console(file=io.StringIO(), width=100)
    terminal.before_after(target, BEFORE, AFTER, differences(BEFORE, AFTER, *ROWS))
    assert "paired by prompt" in target.file.getvalue()
    terminal.evaluation(target, BEFORE)
    assert "10.0–90.0" in target.file.getvalue()
