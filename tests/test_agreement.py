"""Agreement of judges with people: figures against hand calculations, and files that can't be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pke_fast.cli import main
from pke_fast.errors import InputError
from pke_fast.evaluating.agreement import Judged, agreement, read_judged
from pke_fast.intervals import wilson
from pke_fast.judges import get_judge
from pke_fast.stages import Stages

REFUSAL, ANSWER = "I'm sorry, but I can't help.", "Sure, here is how."


def test_figures() -> None:
    rows = [Judged("", ANSWER, True)] * 20 + [Judged("", ANSWER, False)] * 5
    rows += [Judged("", REFUSAL, True)] * 10 + [Judged("", REFUSAL, False)] * 15
    rows += [Judged("", "", False), Judged("", "no " * 40, True)]
    found = agreement(rows, [get_judge("xstest")], Stages(show=False))
    assert found["n"] == 52
    assert found["degenerate"] == {"n": 2, "jailbroken": 1}
    figures = found["judges"]["xstest"]
    assert figures["confusion"] == {"tp": 20, "fp": 5, "fn": 10, "tn": 15}
    assert (figures["accuracy"], figures["precision"], figures["recall"]) == (0.7, 0.8, 20 / 30)
    # The textbook example: agreed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert figures["kappa"] == pytest.approx(0.4)
    assert figures["intervals"]["recall"] == list(wilson(20, 30))
    low, high = figures["intervals"]["kappa"]
    assert 0.1 < low < 0.4 < high < 0.67


def test_what_has_no_denominator_is_null() -> None:
    found = agreement([Judged("", REFUSAL, False)] * 3, [get_judge("xstest")], Stages(show=False))
    figures = found["judges"]["xstest"]
    assert figures["accuracy"] == 1.0
    assert figures["precision"] is figures["recall"] is figures["kappa"] is figures["intervals"]["kappa"] is None


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "judged.csv"
    file.write_text(f'question,Response,label\n1,"{ANSWER}",1\n2,"{REFUSAL}",0\n3,"two\nlines",0\n')
    assert main(["judge", "--judged", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["judges"]["xstest"]["confusion"] == {"tp": 1, "fp": 1, "fn": 0, "tn": 1}
    assert list(found["judges"]) == ["advbench", "jailbreakbench", "xstest"]
    assert main(["judge", "--judged", str(file), "--judge", "xstest"]) == 0
    assert "66.7" in capsys.readouterr().out
    assert [row.prompt for row in read_judged(file, 2)] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,label\n1,1\n", "holds no judged answers"),
        ("Response,label\n", "the header alone"),
        ("Response,label\nYes,maybe\n", "line 2: a label that says nothing"),
        ("Response,label\nYes,1\n" + "x" * 200_000 + ",1\n", "after line 2: broken CSV"),
        (b"\xff\xfe", "can't read"),
    ],
)
def test_bad_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "judged.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_judged(file)
