"""The benchmark of offloaded jobs runs without a GPU: a tiny model, resident, offloaded, and by accelerate."""

from __future__ import annotations

import sys

import offload
import pytest
import random_models
import torch
from results_csv import read_rows

from pke_fast.structure import find_structure


def test_the_jobs_are_measured_and_agree(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.csv"
    monkeypatch.setattr(sys, "argv", ["offload.py", "--device", "cpu", "--tiny", "--out", str(out)])
    assert offload.main() == 0
    rows = read_rows(out)
    value = {(row["provider"], row["x"], row["metric"]): float(row["median"]) for row in rows}
    roomy, tight = sorted({row["x"] for row in rows}, key=float, reverse=True)
    assert value["pke_fast", roomy, "layers offloaded"] == 0
    for provider in ("pke_fast", "accelerate"):
        assert value[provider, tight, "layers offloaded"] == 3
        assert value[provider, tight, "scores apart"] <= offload.APART
        assert value[provider, tight, "locating, s"] > 0
        ratio = value[provider, tight, "in all, s"] / value["pke_fast", roomy, "in all, s"]
        assert value[provider, tight, "time over the resident job's"] == pytest.approx(ratio, rel=1e-3)
    assert ("pke_fast", roomy, "time over the resident job's") not in value
    assert ("accelerate", roomy, "layers offloaded") not in value
    assert rows[0]["torch"] == torch.__version__
    assert "3 layers offloaded" in capsys.readouterr().out


def test_a_job_may_take_a_few_times_as_long_as_a_resident_one():
    assert offload.verdict("pke_fast", 12.0, 3.0) == ", met: at most 3"
    assert offload.verdict("pke_fast", 8.0, 5.1) == ", NOT MET: at most 5"
    assert offload.verdict("pke_fast", 24.0, 9.0) == offload.verdict("accelerate", 8.0, 9.0) == ""


def test_other_scores_fail(tmp_path, monkeypatch):
    own, made = offload.job, []

    def job(*args):
        scores, *rest = own(*args)
        made.append(scores)
        return (scores * len(made), *rest)

    monkeypatch.setattr(offload, "job", job)
    arguments = ["offload.py", "--device", "cpu", "--tiny", "--without", "accelerate", "--out", str(tmp_path / "f.csv")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert offload.main() == 1


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("mistral", False), ("qwen3", True)])
def test_models_of_published_sizes_are_made_whole(family, tied, monkeypatch):
    monkeypatch.setitem(random_models.SIZES, "small", (family, 64, 96, 2, 4, 2, 300, tied))
    monkeypatch.setattr(offload, "POOL", 1 << 12)
    model = offload.host_model("small").requires_grad_(False)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*model.parameters(), *model.buffers()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert find_structure(model).mlps[0].act == "silu"
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
