"""Batched greedy answers against a plain loop over the model's own forward pass, one prompt at a time."""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError
from pke_fast.generation import MANY, end_token_ids, generate
from pke_fast.testing import CONTEXT, FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = [
    "Write a poem about the sea",
    "hi",
    "How do I kill a process?",
    "ünïcode 😀",
    "List three fruits, please.",
    "hi",
]


def plain_answer(model: Any, tokenizer: Any, encoder: PromptEncoder, prompt: str, count: int) -> str:
    ids = encoder.prompt_ids(prompt)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < count and len(ids) + len(answer) < CONTEXT:
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].float().argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def encoder_for(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, PKEConfig(), CONTEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_one_at_a_time(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer(chat=family != "gpt2")
    encoder = encoder_for(tokenizer)
    expected = [plain_answer(model, tokenizer, encoder, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == 5  # one for each distinct prompt, so that a wrong order shows
    for size in (None, 1, 2, 4):
        assert generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=12, batch_size=size) == expected


def test_an_answer_ends_at_the_end_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    encoder = encoder_for(tokenizer)
    long = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=24)
    # Any token can be made an end token: here a letter or digit of the first answer.
    text = next(character for character in long[0][2:] if character.isascii() and character.isalnum())
    end = tokenizer(text)["input_ids"][0]
    model.generation_config.eos_token_id = [256, end]
    assert end_token_ids(model, tokenizer) == [end, 256]
    short = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=24)
    assert short == [answer.partition(text)[0].strip() for answer in long]
    assert short[0] != long[0]


def test_a_tokenizer_without_pad_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, encoder_for(tokenizer), PROMPTS, max_new_tokens=12)
    tokenizer.pad_token = None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    assert generate(model, tokenizer, encoder_for(tokenizer), PROMPTS, max_new_tokens=12) == expected
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(dtype: str) -> None:
    model, tokenizer = tiny_model("llama", dtype=dtype), tiny_tokenizer()
    encoder = encoder_for(tokenizer)
    # Later tokens hang on roundings that differ with and without a cache; the first comes from the same forward pass.
    answers = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=1, batch_size=1)
    assert answers == [plain_answer(model, tokenizer, encoder, prompt, 1) for prompt in PROMPTS]
    batched = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=8)
    assert all(batched)
    assert batched[1] == batched[5]


def test_model_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    encoder = encoder_for(tokenizer)
    expected = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=12)
    own = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, eos_token_id=256)
    before = own.to_dict()
    model.generation_config = own
    model.train()
    model.model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, side = torch.get_rng_state(), tokenizer.padding_side
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=12) == expected  # still greedy, no penalty
    assert caplog.records == []
    assert model.generation_config is own
    assert own.to_dict() == before
    assert [module.training for module in (model, model.model.layers[0], model.model.norm)] == [True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert tokenizer.padding_side == side


def test_model_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    own = model.generation_config
    model.train()

    def interrupted(**_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, encoder_for(tokenizer), PROMPTS)
    assert model.generation_config is own
    assert model.training


def test_progress_counts_every_prompt_once() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    steps: list[int] = []
    generate(model, tokenizer, encoder_for(tokenizer), PROMPTS, max_new_tokens=2, batch_size=4, advance=steps.append)
    assert steps == [4, 2]
    assert generate(model, tokenizer, encoder_for(tokenizer), []) == []


def test_one_long_prompt_has_a_batch_of_its_own() -> None:
    """A bound on tokens is a bound on each batch: the others are as large as their own lengths allow."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat=False)
    prompts = ["a" * 60, *("b" * (8 + n % 3) for n in range(7))]
    steps: list[int] = []
    given = {"max_new_tokens": 2, "tokens_at_once": 63}
    found = generate(model, tokenizer, encoder_for(tokenizer), prompts, advance=steps.append, **given)
    assert steps == [1, 5, 2]
    alone = [generate(model, tokenizer, encoder_for(tokenizer), [prompt], max_new_tokens=2)[0] for prompt in prompts]
    assert found == alone


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's learnt positions end where the context ends
def test_answers_stop_where_the_context_is_full(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer(chat=False)
    encoder = encoder_for(tokenizer)
    prompts = ["a" * (CONTEXT - 3), "b", "c" * (CONTEXT - 20), "d" * (CONTEXT - 3)]
    expected = [plain_answer(model, tokenizer, encoder, prompt, 10) for prompt in prompts]
    assert generate(model, tokenizer, encoder, prompts, max_new_tokens=10) == expected


def test_bad_input() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat=False)
    with pytest.raises(InputError, match="a prompt is too long"):
        generate(model, tokenizer, encoder_for(tokenizer), ["fine", "x" * CONTEXT])
    with pytest.raises(InputError, match="leaves no room for an answer"):  # an encoder that wasn't told the context
        generate(model, tokenizer, PromptEncoder(tokenizer, PKEConfig(max_length=4000)), ["x" * CONTEXT])
    with pytest.raises(InputError, match="max_new_tokens is out of range"):
        generate(model, tokenizer, encoder_for(tokenizer), ["hi"], max_new_tokens=0)
    with pytest.raises(InputError, match="batch_size is out of range"):
        generate(model, tokenizer, encoder_for(tokenizer), ["hi"], batch_size=0)


ON_GPU = torch.cuda.OutOfMemoryError("too much")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU, MemoryError()], ids=["gpu", "cpu", "python"])
def test_out_of_memory_halves_the_batch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, encoder_for(tokenizer), PROMPTS, max_new_tokens=6)
    own, sizes = model.generate, []

    def small_memory(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise error
        return own(**kwargs)

    monkeypatch.setattr(model, "generate", small_memory)
    assert generate(model, tokenizer, encoder_for(tokenizer), PROMPTS, max_new_tokens=6) == expected
    assert sizes == [6, 3, 1, 2, 3, 1, 2]


def test_memory_that_runs_out_for_one_prompt_and_other_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    sizes: list[int] = []

    def fails(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        raise error

    monkeypatch.setattr(model, "generate", fails)
    for error, tried in ((ON_GPU, [6, 3, 1]), (RuntimeError("shapes differ"), [6])):
        sizes.clear()
        with pytest.raises(RuntimeError, match=str(error)):
            generate(model, tokenizer, encoder_for(tokenizer), PROMPTS, max_new_tokens=6)
        assert sizes == tried


def test_the_cache_is_gone_before_half_of_the_rows_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = [f"Write down the number {n:02}" for n in range(MANY)]
    expected = generate(model, tokenizer, encoder_for(tokenizer), prompts, max_new_tokens=4)
    own, caches = model.generate, []

    def small_memory(**kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 4:
            assert not any(cache() for cache in caches)
            caches.append(weakref.ref(kwargs["past_key_values"]))
            raise torch.cuda.OutOfMemoryError("too much")
        return own(**kwargs)

    monkeypatch.setattr(model, "generate", small_memory)
    assert generate(model, tokenizer, encoder_for(tokenizer), prompts, max_new_tokens=4) == expected
    assert len(caches) == 3  # 16, 8, 8 rows
