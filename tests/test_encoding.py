"""Prompts and answers as tokens, with a chat template and without one."""

from __future__ import annotations

import pytest

from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError
from pke_fast.testing import tiny_tokenizer


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_the_chat_template_is_applied():
    tokenizer = tiny_tokenizer()
    encoded = PromptEncoder(tokenizer, PKEConfig()).encode("Hi", "Yes.", end=True)
    assert decode(tokenizer, encoded.ids[: encoded.prompt_length]) == "<|start|>u:Hi<|end|><|start|>a:"
    assert decode(tokenizer, encoded.ids[encoded.prompt_length :]) == "Yes.<|end|>"


def test_without_a_template_the_prompt_is_plain():
    tokenizer = tiny_tokenizer(chat=False)
    encoded = PromptEncoder(tokenizer, PKEConfig()).encode("Hi", " Yes.")
    assert decode(tokenizer, encoded.ids[: encoded.prompt_length]) == "Hi"
    assert decode(tokenizer, encoded.ids[encoded.prompt_length :]) == " Yes."


def test_system_prompt_and_suffix():
    config = PKEConfig(system_prompt="Be kind.", suffix_system_prompt="Answer:")
    tokenizer = tiny_tokenizer()
    assert (
        PromptEncoder(tokenizer, config).text("Hi")
        == "<|system|>Be kind.<|end|><|start|>u:Hi Answer:<|end|><|start|>a:"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['content'] }}]{% endfor %}"
    )
    assert PromptEncoder(tokenizer, config).text("Hi") == "[Be kind.\n\nHi Answer:]"
    assert PromptEncoder(tiny_tokenizer(chat=False), config).text("Hi") == "Be kind.\n\nHi Answer:"


def test_answers_are_cut_prompts_are_not():
    encoder = PromptEncoder(tiny_tokenizer(), PKEConfig(), context=30)
    encoded = encoder.encode("Hi", "x" * 100, end=True)
    assert len(encoded.ids) == 30
    assert encoded.answer_length == 30 - encoded.prompt_length
    assert encoder.encode("Hi", "abcdef", end=True, answer_tokens=4).answer_length == 4
    with pytest.raises(InputError, match="a prompt is too long: 'long"):
        encoder.prompt_ids("long " * 20)
    with pytest.raises(InputError, match="an answer has no tokens"):
        encoder.encode("Hi", "")


def test_a_tokenizer_that_merges_across_the_seam_does_not_change_the_prompt():
    class Merging:
        """Tokens are characters, but "?Y" is one token."""

        chat_template, eos_token_id = "{{ messages[0]['content'] }}", None

        def __call__(self, text, add_special_tokens=True):
            ids = []
            while text:
                width = 2 if text.startswith("?Y") else 1
                ids.append(sum(ord(c) * 1000**i for i, c in enumerate(text[:width])))
                text = text[width:]
            return {"input_ids": ids}

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

    encoded = PromptEncoder(Merging(), PKEConfig()).encode("Hi?", "Yes")
    assert [chr(i) for i in encoded.ids] == ["H", "i", "?", "Y", "e", "s"]
    assert encoded.prompt_length == 3
