"""Judges that are models or functions: loaded from tiny checkpoints, and compared with plain forward passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pke_fast.cli import main
from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError
from pke_fast.evaluating.loglikelihood import continuation_logprobs, joined
from pke_fast.evaluating.verdicts import open_judges
from pke_fast.evaluation import evaluate_model
from pke_fast.stages import Stages
from pke_fast.testing import CONTEXT, FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = [f"prompt {i}" for i in range(20)]
ANSWERS = [f"{chr(97 + i)} {'word ' * (5 * i % 17)}{chr(117 - i)}" for i in range(20)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification

    config = tiny_model("llama").config
    config.id2label, config.label2id = {0: "Safe", 1: "Unsafe"}, {"Safe": 0, "Unsafe": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.5)
    folder = tmp_path_factory.mktemp("judges") / "classifier"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "causal"
    tiny_model("llama", seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(classifier: Path) -> torch.Tensor:
    """What a plain forward pass of the classifier gives for each answer by itself, [answers, classes]."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(classifier), tiny_tokenizer()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(answer)["input_ids"]])).logits for answer in ANSWERS])


def test_a_classifier_gives_the_verdicts_of_a_plain_forward_pass(classifier: Path) -> None:
    (judge,) = open_judges([f"classifier:{classifier}"])
    expected = [bool(unsafe > safe) for safe, unsafe in logits(classifier)]
    assert 0 < sum(expected) < len(expected)
    done: list[int] = []
    assert judge.verdicts(PROMPTS, ANSWERS, done.append) == expected
    assert sum(done) == len(ANSWERS)
    assert judge.tells == "harm"
    (other,) = open_judges([f"classifier:{classifier}#safe"])
    assert other.verdicts(PROMPTS, ANSWERS) == [not verdict for verdict in expected]
    (pair,) = open_judges([f"pair-classifier:{classifier}"])
    assert pair.verdicts(PROMPTS, ANSWERS) != expected  # it reads the prompt as well


def with_config(classifier: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the classifier with other values in its configuration."""
    for file in classifier.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((classifier / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_classifier_of_several_classes_at_once_is_asked_about_one(classifier: Path, tmp_path: Path) -> None:
    folder = with_config(classifier, tmp_path, problem_type="multi_label_classification")
    (judge,) = open_judges([f"classifier:{folder}"])
    expected = [bool(unsafe.sigmoid() > 0.5) for _, unsafe in logits(folder)]
    assert 0 < sum(expected) < len(expected)
    assert judge.verdicts(PROMPTS, ANSWERS) == expected
    assert open_judges([f"classifier:{classifier}"])[0].verdicts(PROMPTS, ANSWERS) != expected


def test_a_classifier_of_one_number_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_model("llama").config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no classes apart"):
        open_judges([f"classifier:{tmp_path}"])


def test_a_classifier_whose_classes_tell_nothing_must_be_told(classifier: Path, tmp_path: Path, causal: Path) -> None:
    with pytest.raises(InputError, match="counts as harm can't be told"):
        open_judges([f"classifier:{classifier}#bad"])
    names = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    with_config(classifier, tmp_path, **names)
    with pytest.raises(InputError, match="#LABEL_0"):
        open_judges([f"classifier:{tmp_path}"])
    assert open_judges([f"classifier:{tmp_path}#LABEL_1"])[0].verdicts(["a"], ["b"]) is not None
    with pytest.raises(InputError, match="lacks weights"):  # a causal model has no classes
        open_judges([f"classifier:{causal}#LABEL_1"])


def plain(model: Any, context: list[int], ending: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([context + ending])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(context) - 1 + i, token]) for i, token in enumerate(ending))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_plain_ones(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    rows = [joined(tokenizer, prompt * (1 + i % 5), f" {i}") for i, prompt in enumerate(PROMPTS)]
    rows.append(([7] * (2 * CONTEXT), [8, 9]))  # too long: the context loses its beginning
    done: list[int] = []
    found = continuation_logprobs(model, tokenizer, rows, advance=done.append)
    cut = [*rows[:-1], ([7] * (CONTEXT - 2), [8, 9])]
    assert found == pytest.approx([plain(model, list(a), list(b)) for a, b in cut], abs=2e-4)
    assert sum(done) == len(rows)
    with pytest.raises(InputError, match="nothing to score"):
        continuation_logprobs(model, tokenizer, [([], [1])])
    with pytest.raises(InputError, match="too long"):
        continuation_logprobs(model, tokenizer, [([1], [1] * CONTEXT)])


def test_a_causal_judge_says_the_likelier_word(causal: Path) -> None:
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer()
    template = "Q: {prompt} A: {answer} Harmful?"
    (judge,) = open_judges([f"causal:{causal}# yes/ no"], template=template)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = tokenizer(template.format(prompt=prompt, answer=answer))["input_ids"]
        yes, no = (plain(model, ids, tokenizer(word)["input_ids"]) for word in (" yes", " no"))
        expected.append(yes > no)
    done: list[int] = []
    assert judge.verdicts(PROMPTS, ANSWERS, done.append) == expected
    assert sum(done) == len(ANSWERS)
    (guard,) = open_judges([f"causal:{causal}"])
    assert guard.text("P", "A") == "<|start|>u:P<|end|><|start|>a:A<|end|><|start|>a:"
    assert len(guard.verdicts(PROMPTS, ANSWERS)) == 20
    # What a model wrote is never read as a part of the template.
    assert judge.text("{answer}", "{prompt}") == "Q: {answer} A: {prompt} Harmful?"


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("causal:{causal}#yes", None, "the words of the judge"),
        ("causal:{causal}#a/a", None, "the words of the judge"),
        ("causal:{causal}", "{prompt}", "lacks {answer}"),
        ("causl:x", None, "did you mean 'causal'"),
        ("python:no_such_module:f", None, "can't be imported"),
        ("python:json:no_such_function", None, "can't be imported"),
        ("python::f", None, "can't be imported"),
        ("python:sys:path", None, "no function that judges"),
        ("classifier:", None, "unknown judge"),
        ("classifier:/no/such/folder", None, "no such folder"),
    ],
)
def test_bad_judges(causal: Path, name: str, template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_judges([name.replace("{causal}", str(causal))], template=template)


MODULE = """
def refuses(prompts, answers):
    return [len(answer) % 2 == 0 for answer in answers]

def harm(prompts, answers):
    return [prompt.endswith("1") for prompt in prompts]

harm.tells = "harm"

def wrong(prompts, answers):
    return [0.5]

def silent(prompts, answers):
    return None
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "some_judges.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "python:some_judges"
    sys.modules.pop("some_judges", None)


def test_functions_judge_refusal_or_harm(functions: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, PKEConfig(), CONTEXT)
    judges = ["xstest", f"{functions}:refuses", f"{functions}:harm"]
    given = (model, tokenizer, encoder, ["h 1", "h 2", "h 3", "h 21"], ["b 1", "b 2"], None)
    result = evaluate_model(*given, judges=judges, max_new_tokens=4, stages=Stages(show=False))
    assert result.harmful is not None
    assert result.benign is not None
    assert result.harmful["asr"][f"{functions}:harm"] == 0.5
    assert result.harmful["intervals"]["asr"][f"{functions}:harm"][0] < 0.5
    odd = [len(row["answer"]) % 2 for row in result.generations if row["set"] == "harmful"]
    assert result.harmful["asr"][f"{functions}:refuses"] == sum(odd) / 4
    assert set(result.benign["refusal_rate"]) == {"xstest", f"{functions}:refuses"}  # harm isn't asked of benign ones
    assert result.generations[0]["harmful"] == {f"{functions}:harm": True}
    assert "harmful" not in result.generations[-1]
    for bad in ("wrong", "silent"):
        with pytest.raises(InputError, match="doesn't judge"):
            evaluate_model(*given, judges=[f"{functions}:{bad}"], max_new_tokens=2, stages=Stages(show=False))
    with pytest.raises(InputError, match="can't be stopped early"):
        evaluate_model(*given, judges=judges, stop_early=True, stages=Stages(show=False))


def test_eval_takes_judges_by_name(classifier: Path, causal: Path, functions: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("One\nTwo\nThree\n")
    (tmp_path / "template.txt").write_text("{prompt} {answer} ?")
    names = [f"classifier:{classifier}", f"causal:{causal}#yes/no", f"{functions}:harm", "xstest"]
    given = ["--harmful", tmp_path / "prompts.txt", "--benign", tmp_path / "prompts.txt", "--max-new-tokens", 3]
    given += ["--judge", *names, "--judge-template", tmp_path / "template.txt", "--out", tmp_path / "out", "--json"]
    assert main([str(part) for part in ["eval", "--model", causal, *given]]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["harmful"]["asr"]) == set(names)
    assert list(figures["benign"]["refusal_rate"]) == ["xstest"]
    assert figures["settings"]["judges"] == names
