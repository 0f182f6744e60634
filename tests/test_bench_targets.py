"""The benchmark of resident 8B jobs runs without a GPU, on a tiny model, and tells which targets are met."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import targets
import torch
from offload import put_back
from results_csv import read_rows

from pke_fast.errors import PKEError


def test_every_target_has_a_figure(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.csv"
    monkeypatch.setattr(sys, "argv", ["targets.py", "--device", "cpu", "--tiny", "--rounds", "1", "--out", str(out)])
    assert targets.main() == 0
    rows = read_rows(out)
    value = {row["metric"]: float(row["median"]) for row in rows}
    assert set(targets.AT_MOST) | set(targets.AT_LEAST) <= set(value)
    assert value["whole job, s"] == pytest.approx(value["locating, s"] + value["editing, s"], rel=1e-4)
    for what, whose in (("tracing", "hooks"), ("steps", "dense masked Adam")):
        for run in (what, f"lean {what}"):
            ours, theirs = value[f"{run}, s, pke_fast"], value[f"{run}, s, {whose}"]
            ratio = next(v for name, v in value.items() if name.startswith(f"{run}, time over"))
            assert ratio == pytest.approx(ours / theirs, rel=1e-4)
    assert rows[0]["torch"] == torch.__version__
    assert ": at most 60" in capsys.readouterr().out


def test_results_that_differ_cost_their_own_figures_alone(tmp_path, monkeypatch, capsys):
    def differ(*_):
        raise PKEError("the two edits differ")

    out = tmp_path / "figures.csv"
    monkeypatch.setattr(targets, "check_equal_steps", differ)
    monkeypatch.setattr(sys, "argv", ["targets.py", "--device", "cpu", "--tiny", "--rounds", "1", "--out", str(out)])
    assert targets.main() == 1
    found = {row["metric"] for row in read_rows(out)}
    missing = (set(targets.AT_MOST) | set(targets.AT_LEAST)) - found
    assert missing == {name for name in targets.AT_MOST if "steps" in name}
    assert "fault: lean steps beside dense Adam's: the two edits differ" in capsys.readouterr().err


def test_weights_are_put_back_where_they_lie():
    """What an outcome holds is with the host, whatever device was worked on: here one without data."""
    model = torch.nn.Linear(4, 3, device="meta")
    part = SimpleNamespace(weight="weight", axis=1, index=torch.tensor([0, 2]), old=torch.zeros(2, 3))
    put_back(SimpleNamespace(model=model), SimpleNamespace(layers=[part]))


def test_verdicts():
    assert targets.verdict("whole job, s", 60.0) == "met: at most 60"
    assert targets.verdict("whole job, s", 60.1) == "NOT MET: at most 60"
    assert targets.verdict("locating, share of the measured matmul rate", 0.4) == "NOT MET: at least 0.45"
    assert targets.verdict("lean tracing, memory over hooks'", 0.11) == "NOT MET: at most 0.1"
    assert targets.verdict("locating, bytes over the weights", 9e9) == ""  # a plan takes what room there is
