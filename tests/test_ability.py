"""Multiple choice against plain forward passes, files of questions, and the harness as an extra."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pke_fast.cli import main
from pke_fast.errors import InputError
from pke_fast.evaluating.ability import measure_ability, read_questions
from pke_fast.evaluating.harness import run_harness
from pke_fast.intervals import wilson
from pke_fast.testing import tiny_model, tiny_tokenizer

CHOOSE = [{"query": f"Question {i} ", "choices": ["a", "bb bb", f"c{i}"], "gold": i % 3} for i in range(12)]
FILL = [{"context_options": [f"The {i} cat", "A dog"], "continuation": " sat.", "gold": i % 2} for i in range(8)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def plain(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    head, tail = tokenizer(context)["input_ids"], tokenizer(ending)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(head) - 1 + i, token]) for i, token in enumerate(tail))


def test_the_likeliest_option_is_the_answer(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for rows in (CHOOSE, FILL):
        questions = read_questions(write(tmp_path / "q.jsonl", rows))
        expected: dict[str, list[int]] = {"correct": [], "correct_normalised": []}
        for row in rows:
            options = [(row["query"].strip(), c) for c in row["choices"]] if "query" in row else None
            options = options or [(c, row["continuation"].strip()) for c in row["context_options"]]
            scores = [plain(model, tokenizer, context, f" {ending}") for context, ending in options]
            normal = [score / len(ending) for score, (_, ending) in zip(scores, options, strict=True)]
            expected["correct"].append(int(scores.index(max(scores)) == row["gold"]))
            expected["correct_normalised"].append(int(normal.index(max(normal)) == row["gold"]))
        done: list[int] = []
        found = measure_ability(model, tokenizer, questions, advance=done.append)
        assert {key: found[key] for key in expected} == expected
        assert found["accuracy"] == sum(expected["correct"]) / len(rows)
        assert found["intervals"]["accuracy"] == list(wilson(sum(expected["correct"]), len(rows)))
        again = measure_ability(model, tokenizer, questions)
        less = measure_ability(model, tokenizer, questions[:-1])
        assert again["sha256"] == found["sha256"] != less["sha256"]
        assert sum(done) == sum(len(question.options) for question in questions)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: broken JSON"),
        ("[]", "line 2: no question"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "no question"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "no question"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold from 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "no right answer"),
        ('{"context_options": ["b", "c"], "gold": 1}', "no question"),
    ],
)
def test_bad_questions(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(CHOOSE[0]) + "\n" + line)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q.jsonl", 1)


def test_the_command_measures_ability_alone(tmp_path: Path, capsys: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    files = [write(tmp_path / "choose.jsonl", CHOOSE), write(tmp_path / "fill.jsonl", FILL)]
    command = ["eval", "--model", tmp_path / "model", "--ability", *files, "--out", tmp_path / "out"]
    assert main([str(part) for part in [*command, "--json"]]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["harmful"] is None
    assert {name: found["n"] for name, found in figures["ability"].items()} == {"choose": 12, "fill": 8}
    assert main([str(part) for part in [*command, "--force"]]) == 0
    out = capsys.readouterr().out
    assert "fill, by characters" in out
    assert "less is better" not in out  # an empty table isn't shown
    assert main([str(part) for part in [*command[:3], "--out", tmp_path / "none"]]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err


def test_files_of_one_name_are_refused_before_anything_is_loaded(tmp_path: Path, capsys: Any) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    files = [write(tmp_path / "a" / "test.jsonl", CHOOSE), write(tmp_path / "b" / "test.json", FILL)]
    command = ["eval", "--model", tmp_path / "none", "--ability", *files, "--out", tmp_path / "out"]
    assert main([str(part) for part in [*command, "--judge", "no such judge"]]) == 2
    assert "the files of --ability can't be told apart" in capsys.readouterr().err


def test_the_harness_gets_the_live_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("llama"), {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        seen.update(given)
        return {"results": {"boolq": {"acc,none": 0.5, "alias": "boolq", "samples": [1]}}}

    fakes = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    fakes["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    fakes["lm_eval.models.huggingface"].HFLM = lambda **given: given  # type: ignore[attr-defined]
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    assert run_harness(model, "tokenizer", ["boolq"], 3) == {"boolq": {"acc,none": 0.5, "alias": "boolq"}}
    assert seen["model"]["pretrained"] is model
    assert (seen["tasks"], seen["limit"]) == (["boolq"], 3)


def test_a_missing_harness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pke_fast\[harness\]"):
        run_harness(None, None, ["boolq"])
