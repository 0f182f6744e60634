"""`pke-fast bench`: figures that fit together, of results that were found equal."""

from __future__ import annotations

import json

import pytest
import torch

from pke_fast.bench import cases, short
from pke_fast.bench.cases import check_equal, check_equal_steps
from pke_fast.bench.measuring import RETURNED, Spread, in_fresh_process, in_turns
from pke_fast.bench.subjects import loaded_subject, spread_neurons
from pke_fast.cli import main
from pke_fast.config import PKEConfig
from pke_fast.errors import PKEError
from pke_fast.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    def here(function: str, **arguments):
        return getattr(cases, function.split(":")[1])(**arguments)

    monkeypatch.setattr(short, "in_fresh_process", here)


@pytest.mark.usefixtures("in_this_process")
def test_bench_prints_json(folder, capsys) -> None:
    assert main(["bench", "--model", folder, "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found["trace"]) == {"pke_fast", "hooks"}
    assert set(found["step"]) == {"pke_fast", "dense masked Adam"}
    for job in ("trace", "step"):
        ours, theirs = found[job].values()
        assert found["ratios"][job]["time"] == ours["seconds"]["median"] / theirs["seconds"]["median"]
        for figures in (ours, theirs):
            assert 0 < figures["seconds"]["low"] <= figures["seconds"]["median"] <= figures["seconds"]["high"]
            assert figures["peak_bytes"] >= 0
    assert max(found["apart"].values()) < 1e-3
    assert found["model"]["layers"] == 3
    assert "Trace and score 16 requests" in err
    assert "of the time" in err


def test_a_model_that_is_not_there(tmp_path, capsys) -> None:
    assert main(["bench", "--model", str(tmp_path / "absent.gguf"), "--device", "cpu"]) == 2
    assert "absent.gguf" in capsys.readouterr().err


def test_scores_that_differ_are_not_timed() -> None:
    maps = torch.ones(2, 3), torch.ones(2, 3)
    off = torch.ones(2, 3), torch.full((2, 3), 1.01)
    assert check_equal(off, maps, torch.bfloat16, "x") == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(PKEError, match="scores of x are others"):
        check_equal(off, maps, torch.float32, "x")
    with pytest.raises(PKEError, match="others"):
        check_equal((maps[0], maps[1] * torch.nan), maps, torch.bfloat16, "x")


def test_steps_that_differ_are_not_timed(folder, monkeypatch) -> None:
    config = PKEConfig(lr=1e-2, lr_end=1.0, batch_size=4, locality_batch_size=4)
    with loaded_subject(folder, 4, 4) as subject:
        neurons = spread_neurons(subject.structure, 1, 10)
        before = subject.structure.down_weight(1).clone()
        assert check_equal_steps(subject, neurons, config) < 1e-3
        assert torch.equal(subject.structure.down_weight(1), before)
        monkeypatch.setattr("pke_fast.bench.dense_adam.BETA1", 0.8)
        with pytest.raises(PKEError, match="two edits differ"):
            check_equal_steps(subject, neurons, config)
        assert torch.equal(subject.structure.down_weight(1), before)


def test_variants_take_turns() -> None:
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = in_turns(runs, 3, torch.device("cpu"))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert set(times) == set("abc")
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_process_of_its_own(tmp_path) -> None:
    (tmp_path / "one_case.py").write_text(
        "import os\ndef case(x, fail=False):\n"
        "    print('heard')\n"
        "    if fail: raise ValueError('no such case')\n"
        "    return {'x': x, 'tight': os.environ.get('MALLOC_MMAP_THRESHOLD_'), 'pid': os.getpid()}\n"
    )
    found = in_fresh_process("one_case:case", beside=tmp_path, x=[1, "a"])
    assert (found["x"], found["tight"]) == ([1, "a"], str(RETURNED))
    with pytest.raises(PKEError, match="no such case"):
        in_fresh_process("one_case:case", beside=tmp_path, x=1, fail=True)
