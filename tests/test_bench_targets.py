"""The benchmark of resident 8B jobs runs without a GPU, on a tiny model, and tells which targets are met."""

from __future__ import annotations

import sys

import pytest
import targets
import torch
from results_csv import read_rows


def test_every_target_has_a_figure(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.csv"
    monkeypatch.setattr(sys, "argv", ["targets.py", "--device", "cpu", "--tiny", "--rounds", "1", "--out", str(out)])
    assert targets.main() == 0
    rows = read_rows(out)
    value = {row["metric"]: float(row["median"]) for row in rows}
    assert set(targets.AT_MOST) | set(targets.AT_LEAST) <= set(value)
    assert value["whole job, s"] == pytest.approx(value["locating, s"] + value["editing, s"], rel=1e-4)
    for what, whose in (("tracing", "hooks"), ("lean tracing", "hooks"), ("steps", "dense masked Adam")):
        ours, theirs = value[f"{what}, s, pke_fast"], value[f"{what}, s, {whose}"]
        ratio = next(v for name, v in value.items() if name.startswith(f"{what}, time over"))
        assert ratio == pytest.approx(ours / theirs, rel=1e-4)
    assert rows[0]["torch"] == torch.__version__
    assert ": at most 60" in capsys.readouterr().out


def test_verdicts():
    assert targets.verdict("whole job, s", 60.0) == "met: at most 60"
    assert targets.verdict("whole job, s", 60.1) == "NOT MET: at most 60"
    assert targets.verdict("locating, share of the measured matmul rate", 0.4) == "NOT MET: at least 0.45"
    assert targets.verdict("lean tracing, memory over hooks'", 0.11) == "NOT MET: at most 0.1"
    assert targets.verdict("locating, bytes over the weights", 9e9) == ""  # a plan takes what room there is
