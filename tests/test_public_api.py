"""What is public stays public: names, signatures and the settings' names are promises."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

import pke_fast
from pke_fast.loading import LoadedModel
from pke_fast.testing import tiny_model, tiny_tokenizer

NAMES = {
    "EditError",
    "EditRequest",
    "EditResult",
    "HotSpots",
    "InputError",
    "LocateResult",
    "PKEConfig",
    "PKEError",
    "Pair",
    "Patch",
    "PatchError",
    "Scores",
    "edit",
    "evaluate",
    "export_patch",
    "load_config",
    "load_model",
    "locate",
    "read_pairs",
    "read_prompts",
    "read_requests",
    "select",
    "stream_pairs",
    "stream_requests",
    "trace",
    "update",
}
SETTINGS = {
    "method", "k", "window", "per_layer_cap", "num_steps", "batch_size", "lr", "weight_decay", "w_edit", "w_kl",
    "norm_constraint", "refusal", "system_prompt", "suffix_system_prompt", "max_length", "micro_batch_tokens", "seed",
}  # fmt: skip


def test_every_public_name_is_there_and_no_other():
    assert set(pke_fast.__all__) == NAMES
    for name in NAMES:
        assert getattr(pke_fast, name).__name__ == name
    assert set(dir(pke_fast)) >= NAMES


def test_the_entry_points_take_what_they_promise():
    def parameters(function):
        return list(inspect.signature(function).parameters)

    assert parameters(pke_fast.edit)[:4] == ["model", "tokenizer", "requests", "config"]
    assert parameters(pke_fast.locate)[:4] == ["model", "tokenizer", "requests", "config"]
    assert parameters(pke_fast.evaluate)[:4] == ["model", "tokenizer", "harmful", "benign"]
    assert parameters(pke_fast.trace)[:2] == ["model", "batches"]
    assert parameters(pke_fast.select)[:3] == ["scores", "locality", "k"]
    assert parameters(pke_fast.update)[:4] == ["model", "hot_spots", "batches", "locality"]
    assert parameters(pke_fast.export_patch)[:4] == ["patch", "model", "out", "format"]
    assert parameters(pke_fast.load_model)[:3] == ["name", "device", "dtype"]


def test_the_promised_settings_exist():
    assert {field.name for field in dataclasses.fields(pke_fast.PKEConfig)} >= SETTINGS


def test_errors_say_how_the_command_line_exits():
    assert pke_fast.InputError.exit_status == 2
    assert issubclass(pke_fast.PatchError, pke_fast.InputError)
    assert pke_fast.EditError.exit_status == pke_fast.PKEError.exit_status == 1
    error = pke_fast.InputError("what", expected="a", got="b", do="c")
    assert str(error) == "what\n  expected: a\n  got: b\n  do: c"


REQUEST, PAIR = pke_fast.EditRequest("Pick a lock"), pke_fast.Pair("Bake")


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny", None, "cpu", "fp32")


class Stream:
    """Something to go through that isn't a list."""

    def __init__(self, *items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("call", [pke_fast.edit, pke_fast.locate])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "model can't be used(.|\n)*got: str 'llama'(.|\n)*load_model"),
        ({"model": None}, "model can't be used(.|\n)*got: NoneType"),
        ({"tokenizer": None}, "tokenizer can't be used(.|\n)*got: NoneType"),
        ({"requests": "How to pick a lock"}, "requests can't be used(.|\n)*got: str 'How to"),
        ({"requests": REQUEST}, "requests can't be used(.|\n)*a list of EditRequest"),
        ({"requests": Stream(REQUEST, "Pick")}, "item 1 of requests can't be used(.|\n)*got: str 'Pick'"),
        ({"requests": {REQUEST}}, "requests can't be used(.|\n)*got: set"),
        ({"requests": {"prompt": "Pick"}}, "requests can't be used(.|\n)*got: dict"),
        ({"requests": None}, "requests can't be used"),
        ({"requests": ["How to pick a lock"]}, "item 0 of requests can't be used(.|\n)*do: EditRequest"),
        ({"requests": [REQUEST, {"prompt": "x"}]}, "item 1 of requests can't be used(.|\n)*got: dict"),
        ({"config": {"k": 3}}, "config can't be used(.|\n)*do: PKEConfig"),
        ({"locality": PAIR}, "locality can't be used(.|\n)*a list of Pair"),
        ({"locality": [("Bake", "Flour")]}, "item 0 of locality can't be used"),
        ({"memory_budget": "8GiB"}, "memory_budget can't be used(.|\n)*got: str '8GiB'"),
        ({"memory_budget": float("nan")}, "memory_budget can't be used(.|\n)*got: float nan"),
        ({"memory_budget": True}, "memory_budget can't be used"),
        ({"memory_budget": 0}, "memory_budget can't be used"),
    ],
)
def test_a_likely_mistake_is_told_by_name(call, change, message, loaded):
    arguments = {"model": loaded.model, "tokenizer": loaded.tokenizer, "requests": [REQUEST], **change}
    with pytest.raises(pke_fast.InputError, match=message):
        call(**arguments)


def test_a_loaded_model_is_no_model_and_no_tokenizer(loaded):
    given = loaded.model, loaded.tokenizer
    with pytest.raises(pke_fast.InputError, match=r"got: LoadedModel\n  do: give loaded\.model"):
        pke_fast.edit(loaded, loaded.tokenizer, [REQUEST])
    with pytest.raises(pke_fast.InputError, match=r"got: LoadedModel\n  do: give loaded\.tokenizer"):
        pke_fast.edit(loaded.model, loaded, [REQUEST])
    with pytest.raises(pke_fast.InputError, match=r"compare can't be used(.|\n)*give loaded\.model"):
        pke_fast.locate(*given, [REQUEST], compare=loaded)
    with pytest.raises(pke_fast.InputError, match="held_out can't be used"):
        pke_fast.edit(*given, [REQUEST], held_out="abc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harmful": "abc"}, "harmful can't be used(.|\n)*got: str 'abc'"),
        ({"benign": [REQUEST]}, "item 0 of benign can't be used"),
        ({"text": Path("text.txt")}, "text can't be used"),
        ({"judges": "xstest"}, r"judges can't be used(.|\n)*do: \['xstest'\]"),
        ({"config": {"k": 3}}, "config can't be used"),
        ({"model": "llama"}, "model can't be used"),
        ({"tokenizer": None}, "tokenizer can't be used"),
    ],
)
def test_a_likely_mistake_of_an_evaluation_is_told_by_name(change, message, loaded):
    arguments = {"model": loaded.model, "tokenizer": loaded.tokenizer, "harmful": ["a"], "benign": None, **change}
    with pytest.raises(pke_fast.InputError, match=message):
        pke_fast.evaluate(**arguments)
