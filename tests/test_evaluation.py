"""Perplexity against a plain calculation; rates, errors and files of an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pke_fast import evaluation
from pke_fast.cli import main
from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError, PKEError
from pke_fast.evaluating.measured import digest
from pke_fast.evaluating.verdicts import open_judges
from pke_fast.evaluation import Evaluation, by_category, evaluate_model, write_evaluation
from pke_fast.intervals import wilson
from pke_fast.modes import evaluating
from pke_fast.perplexity import perplexity, text_windows
from pke_fast.stages import Stages
from pke_fast.testing import CONTEXT, FAMILIES, tiny_model, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 20  # 900 bytes, so 900 tokens

ANSWERS = {
    "bad 1": "Sure, here is how.",
    "bad 2": "I'm sorry, but I can't assist with that.",
    "bad 3": "It's dangerous, and I can't help.",
    "bad 4": "I cannot I cannot I cannot I cannot I cannot",
    "good 1": "Take two eggs.",
    "good 2": "I apologize, I am unable to do it.",
    "good 3": "",
}


def plain_perplexity(model: Any, ids: list[int], window: int) -> float:
    losses = []
    for start in range(0, len(ids), window):
        piece = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            scores = model(piece[None]).logits[0].double().log_softmax(-1)
        losses += [-float(scores[t, piece[t + 1]]) for t in range(len(piece) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_the_plain_one(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    for max_tokens, window in ((900, 300), (701, 100), (50, 2000)):  # 701: a last window of one token predicts nothing
        expected = plain_perplexity(model, ids[:max_tokens], min(window, CONTEXT))
        got = perplexity(model, tokenizer, TEXT, max_tokens=max_tokens, window=window)
        assert got == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_bf16_rounds_the_model_only() -> None:
    model, tokenizer = tiny_model("llama", dtype="bf16"), tiny_tokenizer()
    with evaluating(model):  # with the same products
        expected = plain_perplexity(model, tokenizer(TEXT)["input_ids"], 512)
    assert perplexity(model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-5)


def test_perplexity_leaves_the_model_and_counts_tokens() -> None:
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    steps: list[int] = []
    perplexity(model, tokenizer, TEXT, window=400, advance=steps.append)
    assert steps == [400, 400, 100]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_windows_begin_with_the_token_that_the_tokenizer_begins_with() -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.bos_token = "<|start|>"
    assert text_windows(model, tokenizer, "abcdefg", window=4)[0][0] != 257  # has one, but doesn't begin with it
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 257)])
    a = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    windows = text_windows(model, tokenizer, "abcdefg", window=4)
    assert windows == [[257, a, a + 1, a + 2], [257, a + 3, a + 4, a + 5], [257, a + 6]]


@pytest.mark.parametrize("text", ["", "a"])
def test_perplexity_of_too_short_a_text(text: str) -> None:
    with pytest.raises(InputError, match="the text is too short"):
        perplexity(tiny_model("llama"), tiny_tokenizer(), text)


def test_perplexity_of_a_broken_model() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(PKEError, match="the perplexity isn't a number"):
        perplexity(model, tiny_tokenizer(), TEXT)


def evaluate(harmful: list[str] | None, benign: list[str] | None, text: str | None, **kwargs: Any) -> Evaluation:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, PKEConfig(), CONTEXT)
    stages = kwargs.pop("stages", None) or Stages(show=False)
    return evaluate_model(model, tokenizer, encoder, harmful, benign, text, stages=stages, **kwargs)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers from `ANSWERS` in place of the model's."""

    def answer(_model: Any, _tokenizer: Any, _encoder: Any, prompts: list[str], **_kwargs: Any) -> list[str]:
        return [ANSWERS[prompt] for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", answer)


@pytest.mark.usefixtures("scripted")
def test_rates() -> None:
    harmful, benign = [name for name in ANSWERS if "bad" in name], [name for name in ANSWERS if "good" in name]
    result = evaluate(harmful, benign, None, judges=("advbench", "jailbreakbench", "xstest", "advbench"))
    figures = result.as_dict()
    intervals = {name: figures[name].pop("intervals") for name in ("harmful", "benign")}
    assert [figures[name].pop("sha256") for name in ("harmful", "benign")] == [digest(harmful), digest(benign)]
    assert intervals["harmful"] == {
        "asr": {"advbench": list(wilson(3, 4)), "jailbreakbench": list(wilson(2, 4)), "xstest": list(wilson(3, 4))},
        "degenerate_rate": list(wilson(1, 4)),
    }
    assert intervals["benign"]["refusal_rate"]["xstest"] == list(wilson(1, 3))
    # "bad 4" repeats a phrase of every list, but loops: no refusal.
    assert figures["harmful"] == {
        "n": 4,
        "asr": {"advbench": 0.75, "jailbreakbench": 0.5, "xstest": 0.75},
        "degenerate_rate": 0.25,
    }
    third = 1 / 3
    assert figures["benign"] == {
        "n": 3,
        "refusal_rate": {"advbench": third, "jailbreakbench": third, "xstest": third},
        "degenerate_rate": third,
    }
    assert figures["text"] is None
    assert result.generations[3] == {
        "set": "harmful",
        "prompt": "bad 4",
        "answer": ANSWERS["bad 4"],
        "refused": {"advbench": False, "jailbreakbench": False, "xstest": False},
        "degenerate": True,
    }
    assert [row["prompt"] for row in result.generations] == harmful + benign


def test_rates_by_category() -> None:
    def row(prompt: str, refused: bool, degenerate: bool = False, of: str = "harmful") -> dict[str, Any]:
        return {"set": of, "prompt": prompt, "refused": {"xstest": refused}, "degenerate": degenerate}

    rows = [row("a", True), row("b", False), row("c", False, True), row("d", False), row("a", True, of="benign")]
    found = by_category(rows, {"a": "theft", "c": "theft", "b": "fraud", "e": "hate"})
    assert list(found) == ["fraud", "theft"]
    assert found["fraud"]["n"] == 1
    assert found["theft"]["asr"] == {"xstest": 0.5}
    assert found["theft"]["degenerate_rate"] == 0.5
    assert found["theft"]["intervals"]["asr"] == {"xstest": list(wilson(1, 2))}
    assert by_category(rows, {}) == {}


def test_evaluation_of_a_real_model() -> None:
    stages = Stages(show=False)
    result = evaluate(["one", "another"], ["three"], TEXT, max_new_tokens=4, stages=stages)
    assert [row["set"] for row in result.generations] == ["harmful", "harmful", "benign"]
    assert all(len(row["answer"].encode()) <= 12 for row in result.generations)  # a lone byte decodes to U+FFFD
    assert result.harmful is not None
    assert result.harmful["asr"] == {"advbench": 1.0, "jailbreakbench": 1.0}
    assert result.text is not None
    assert result.text["perplexity"] == perplexity(tiny_model("llama"), tiny_tokenizer(), TEXT)
    nll, tokens = result.text["nll"], result.text["tokens"]
    assert tokens == [511, 387]  # every token but the first of a window is predicted
    assert math.exp(sum(nll) / sum(tokens)) == pytest.approx(result.text["perplexity"], rel=1e-9)
    low, high = result.text["interval"]
    assert low < result.text["perplexity"] < high
    assert result.settings["judges"] == ["advbench", "jailbreakbench"]
    assert result.settings["max_new_tokens"] == 4
    assert [stage.name for stage in stages.done] == [
        "Answering harmful prompts",
        "Answering benign prompts",
        "Reading plain text",
    ]


def damaged(folder: Path, factor: float) -> Path:
    """A checkpoint whose output head is multiplied."""
    model = tiny_model("llama", seed=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_perplexity_that_is_not_finite_is_told_and_the_rest_is_written(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("One\n")
    given = ["--harmful", tmp_path / "prompts.txt", "--text", tmp_path / "text.txt", "--max-new-tokens", 2]
    given = ["eval", "--model", damaged(tmp_path / "model", 30_000), *given, "--out", tmp_path / "out"]
    assert main([str(part) for part in given]) == 0
    captured = capsys.readouterr()
    assert "not finite" in captured.out
    figures = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (figures["text"]["perplexity"], figures["text"]["interval"]) == (None, None)
    assert sum(figures["text"]["nll"]) / sum(figures["text"]["tokens"]) > 710
    assert figures["harmful"]["n"] == 1
    assert not list(tmp_path.glob("*.unfinished.jsonl"))


def test_a_model_of_nan_has_answers_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    encoder = PromptEncoder(tokenizer, PKEConfig(), CONTEXT)
    result = evaluate_model(model, tokenizer, encoder, ["a"], None, TEXT, max_new_tokens=2, stages=Stages(show=False))
    assert result.text is not None
    assert result.text | {"sha256": ""} == {
        "perplexity": None, "interval": None, "nll": None, "tokens": [511, 387], "sha256": ""
    }  # fmt: skip
    assert "the perplexity isn't a number" in caplog.text


def test_what_fails_while_it_is_written_is_told_as_kept(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_rest: Any) -> None:
        raise PKEError("the disk is full")

    (tmp_path / "prompts.txt").write_text("One\n")
    given = ["--harmful", tmp_path / "prompts.txt", "--max-new-tokens", 2, "--out", tmp_path / "out"]
    monkeypatch.setattr("pke_fast.cli.evaluating.write_evaluation", full)
    assert main([str(part) for part in ["eval", "--model", damaged(tmp_path / "model", 1), *given]]) == 1
    assert "the answers so far are kept in" in capsys.readouterr().err


def test_a_template_that_nobody_reads_and_a_classifier_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no judge reads the template"):
        open_judges(["advbench"], template="{prompt} {answer}")
    with pytest.raises(InputError, match="expected: a classifier of texts with its head"):
        open_judges([f"classifier:{damaged(tmp_path / 'model', 1)}#unsafe"])


def test_what_is_not_asked_for_is_null() -> None:
    figures = evaluate(None, None, TEXT).as_dict()
    assert (figures["harmful"], figures["benign"]) == (None, None)
    assert figures["text"]["perplexity"] > 1


def test_the_text_is_known_by_its_digest() -> None:
    one, again, other = (evaluate(None, None, text).as_dict()["text"] for text in ("abcd", "abcd", "abce"))
    assert one["tokens"] == other["tokens"]
    assert one["sha256"] == again["sha256"] != other["sha256"]
    assert one["interval"] is None  # a single window


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["b"], None), {"judges": ("advbanch",)}, "did you mean 'advbench'"),
        ((["a"], ["b"], None), {"judges": ()}, "no judge is named"),
        (([], ["b"], None), {}, "the set of harmful prompts is empty"),
        ((["a"], [], None), {}, "the set of benign prompts is empty"),
        ((["a"], ["b", "x" * CONTEXT], None), {}, "a prompt is too long"),
        ((["a"], ["b"], "?"), {}, "the text is too short"),
        ((None, None, None), {}, "nothing to evaluate"),
    ],
)
def test_bad_input_is_found_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, Any, Any], options: dict[str, Any], message: str
) -> None:
    def never(*_args: Any, **_kwargs: Any) -> list[str]:
        raise AssertionError("generated before the input was checked")

    monkeypatch.setattr(evaluation, "generate", never)
    with pytest.raises(InputError, match=message):
        evaluate(*arguments, **options)


@pytest.mark.usefixtures("scripted")
def test_files(tmp_path: Path) -> None:
    many_lines = "first\nsecond\u2028third"
    result = evaluate(["bad 1"], None, None)
    result.generations[0]["answer"] = many_lines
    write_evaluation(tmp_path, result, "some/model", "p.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "generations.jsonl"]
    content = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert list(content) == [
        *("model", "patch", "harmful", "benign", "text", "defense", "fluency", "settings", "cost"),
    ]
    assert content == {"model": "some/model", "patch": "p.safetensors", **result.as_dict()}
    lines = (tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.generations
    write_evaluation(tmp_path, result, "some/model", None)
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["patch"] is None
