"""Greedy answers of a model to many prompts, in left-padded batches of about the same length."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError
from pke_fast.memory import is_out_of_memory
from pke_fast.modes import evaluating
from pke_fast.placement import input_device
from pke_fast.prefix import Prefix, common

TOKENS_AT_ONCE = 8192  # 1 GiB of keys and values on Llama-3-8B in bf16
ROWS_ON_CPU, ROWS_ON_GPU = 32, 64
CHECK_EVERY = 4  # tokens between two looks at whether an answer may end
MANY = 16  # prompts for which it pays to run what all begin with once
CHECKED = 2  # tokens by which it is seen that the model goes on from it as if it had run whole

LOG = logging.getLogger(__name__)


def generate(
    model: Any,
    tokenizer: Any,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    batch_size: int | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    advance: Callable[[int], None] | None = None,
    known: Mapping[int, str] | None = None,
    finished: Callable[[dict[int, str], int], None] | None = None,
    decided: Callable[[str], bool] | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of the prompts, without special tokens and outer blanks.

    Greedy means the most likely token each time: sampling, beams and penalties that the model's own generation settings
    ask for are left out. An answer ends at an end token, at `max_new_tokens`, or where the model's context is full. It
    doesn't depend on the other prompts, up to rounding. The model's mode and settings are as before afterwards.

    Args:
        batch_size: prompts at a time; None: as many as `tokens_at_once` allows, 32 at most on a CPU, 64 on a GPU. A
            batch for which memory runs out is halved.
        tokens_at_once: most tokens (prompt, answer and padding) in a batch; one prompt alone may exceed it.
        advance: called with the number of prompts that a finished batch answered, and at once with that of `known`.
        known: answers by the prompt's index that needn't be made again. The batches are those without them, so a run
            that goes on where it was gives the same answers as one that never stopped.
        finished: called after each batch with its answers by index, and the number of tokens that were generated.
        decided: told an answer so far every few tokens; where it says yes, that answer ends there.

    Raises:
        InputError: a prompt is too long, or a number is below 1.
    """
    from pke_fast.loading import context_length, pad_token_id

    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is out of range", expected="at least 1", got=str(value))
    encoded = [encoder.prompt_ids(prompt) for prompt in prompts]
    rooms = [_room(ids, max_new_tokens, context_length(model)) for ids in encoded]
    if batch_size is None:
        batch_size = ROWS_ON_CPU if input_device(model).type == "cpu" else ROWS_ON_GPU
    else:
        tokens_at_once = sys.maxsize
    ends = end_token_ids(model, tokenizer)
    pad = pad_token_id(tokenizer, model)
    answers = dict(known or {})
    if answers and advance is not None:
        advance(len(answers))

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(_before_end(ids, ends), skip_special_tokens=True)).strip()

    stop = None if decided is None else lambda ids: decided(text(ids))

    with evaluating(model):
        prefix = _prefix(encoded, model, min(rooms), ends, pad) if len(answers) < len(encoded) else None
        for planned in _batches(encoded, rooms, batch_size, tokens_at_once):
            batch = [index for index in planned if index not in answers]
            if not batch:
                continue
            settings = _settings(rooms[batch[0]], ends, pad)
            found = _answer([encoded[i] for i in batch], model, settings, pad, stop, prefix)
            made = {index: text(ids) for index, ids in zip(batch, found, strict=True)}
            answers |= made
            if finished is not None:
                finished(made, sum(min(len(_before_end(ids, ends)) + 1, len(ids)) for ids in found))
            if advance is not None:
                advance(len(batch))
    return [answers[index] for index in range(len(encoded))]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of all tokens that end an answer, ascending: those of the model's settings and the tokenizer's own."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return sorted(found)


def _room(ids: list[int], max_new_tokens: int, context: int | None) -> int:
    """Tokens that the answer to a prompt may have."""
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    if room < 1:
        raise InputError(
            "a prompt leaves no room for an answer",
            expected=f"fewer than {context} tokens, the model's context",
            got=f"{len(ids)} tokens",
            do="shorten the prompt",
        )
    return room


def _batches(encoded: list[list[int]], rooms: list[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Indices of prompts by descending length, so many or so many tokens at a time, padding counted.

    The prompts of a batch have the same room, so that no answer is cut short by a longer prompt beside it.
    """
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    for _, same_room in groupby(order, key=lambda index: rooms[index]):
        group = list(same_room)
        while group:
            size = max(1, min(rows, tokens // (len(encoded[group[0]]) + rooms[group[0]])))
            yield group[:size]
            group = group[size:]


def _settings(max_new_tokens: int, ends: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,  # None, or transformers warns that greedy decoding has no use for them
        top_p=None,
        top_k=None,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


Stop = Callable[[list[int]], bool]


def _prefix(encoded: list[list[int]], model: Any, room: int, ends: list[int], pad: int) -> Prefix | None:
    """What all prompts begin with; None where that saves little, or where two of them would be answered otherwise."""
    shared = common(encoded) if len(encoded) >= MANY else ()
    if not shared:
        return None
    by_length = sorted(encoded, key=len)
    two = [by_length[0], by_length[len(by_length) // 2]]
    settings = _settings(min(room, CHECKED), ends, pad)
    whole = _answer(two, model, settings, pad)
    try:
        prefix = Prefix.of(model, shared, input_device(model))
        apart = _answer(two, model, settings, pad, prefix=prefix)
    except Exception as error:  # noqa: BLE001  whatever a model of another making says to a cache
        LOG.info("every prompt runs whole: %s", error)
        return None
    if apart != whole:
        LOG.info("every prompt runs whole: after their beginning, answers differ")
        return None
    return prefix


def _answer(
    rows: list[list[int]],
    model: Any,
    settings: Any,
    pad: int,
    stop: Stop | None = None,
    prefix: Prefix | None = None,
) -> list[list[int]]:
    """Ids of the answers to a batch of encoded prompts, filled with whatever comes after their end."""
    longest, lead = max(len(row) for row in rows), 0 if prefix is None else len(prefix)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        for part, end in ((row[:lead], lead), (row[lead:], longest)):  # padding goes between what is kept and the rest
            ids[index, end - len(part) : end] = torch.tensor(part)
            mask[index, end - len(part) : end] = 1
    # In place of the model's own too: transformers 4.50 and later merge those into the settings that `generate` gets.
    own, model.generation_config = model.generation_config, settings
    stopped: dict[int, int] = {}
    more: dict[str, Any] = {} if stop is None else {"stopping_criteria": _criteria(stop, longest, stopped)}
    at = input_device(model)
    try:
        if prefix is not None:
            more["past_key_values"] = prefix.rows(len(rows))
        output = model.generate(input_ids=ids.to(at), attention_mask=mask.to(at), generation_config=settings, **more)
        return [row[: stopped.get(index)] for index, row in enumerate(output[:, longest:].tolist())]
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    finally:
        model.generation_config = own
    more.clear()  # the cache grew in place: it has to be gone before half of the rows are tried
    half = len(rows) // 2
    parts = (_answer(part, model, settings, pad, stop, prefix) for part in (rows[:half], rows[half:]))
    return [answer for part in parts for answer in part]


def _criteria(stop: Stop, prompt_length: int, stopped: dict[int, int]) -> Any:
    """transformers' stopping criteria: ends each row where `stop` says so, and notes after how many tokens."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Decided(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
            made = input_ids.shape[1] - prompt_length
            if made % CHECK_EVERY == 0:
                for index, row in enumerate(input_ids[:, prompt_length:].tolist()):
                    if index not in stopped and stop(row):
                        stopped[index] = made
            done = [index in stopped for index in range(len(input_ids))]
            return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Decided()])


def _before_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]
