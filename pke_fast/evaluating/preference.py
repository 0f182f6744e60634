"""Which of two answers is better: asked of a causal model in both orders, or of a Python function."""

from __future__ import annotations

from typing import Any

from pke_fast.errors import InputError
from pke_fast.evaluating.comparing import Preference
from pke_fast.evaluating.functions import function_named
from pke_fast.evaluating.loglikelihood import continuation_logprobs, joined
from pke_fast.loading import load_model

_QUESTION = (
    "Here is a question with two answers.\n\nQuestion: {prompt}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
    "Which answer is better, A or B? Say one letter."
)


def open_preference(name: str, device: str = "auto") -> Preference:
    """``causal:MODEL`` or ``python:MODULE:FUNCTION``, a function of prompts, first and second answers.

    Raises:
        InputError: the name can't be read, or the model or function can't be had.
    """
    kind, _, place = name.partition(":")
    if kind == "causal" and place:
        return causal_preference(load_model(place, device))
    if kind != "python" or not place.partition(":")[2]:
        raise InputError(
            f"unknown judge of preference {name!r}", expected="causal:MODEL or python:MODULE:FUNCTION", got=repr(name)
        )
    return function_named(place, f"the preference {name}", "prefers")


def causal_preference(loaded: Any) -> Preference:
    """The preference of a model that is asked for a letter, in both orders, since models favour one place.

    An answer wins where it is preferred in both orders; otherwise it is a tie.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = bool(getattr(tokenizer, "chat_template", None))

    def text(prompt: str, a: str, b: str) -> str:
        parts = {"{prompt}": prompt, "{a}": a, "{b}": b}
        question = _QUESTION
        # From the last to the first, so that braces in a prompt or an answer stay what they are.
        for mark in sorted(parts, key=question.index, reverse=True):
            at = question.index(mark)
            question = question[:at] + parts[mark] + question[at + len(mark) :]
        if not chat:
            return question + "\n"
        turns = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def prefer(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        rows = []
        for prompt, one, other in zip(prompts, first, second, strict=True):
            for asked in (text(prompt, one, other), text(prompt, other, one)):
                rows += [joined(tokenizer, asked, letter, special=not chat) for letter in ("A", "B")]
        scores = continuation_logprobs(model, tokenizer, rows)
        found = []
        for start in range(0, len(scores), 4):
            a_first, b_first, a_swapped, b_swapped = scores[start : start + 4]
            wins = (b_first > a_first) + (a_swapped > b_swapped)  # of the second answer, in either order
            found.append((0.0, 0.5, 1.0)[wins])
        return found

    return prefer
