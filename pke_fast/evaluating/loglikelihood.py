"""Log-probabilities of continuations, batched: what multiple choice and causal judges go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pke_fast.errors import InputError, PKEError
from pke_fast.loading import context_length, pad_token_id
from pke_fast.modes import evaluating
from pke_fast.placement import input_device

TOKENS_AT_ONCE = 1024  # of a batch, padding included: their logits are 1024 x V numbers, 0.2 GB at V = 49,152 in fp32

Row = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


def continuation_logprobs(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, advance: Callable[[int], None] | None = None
) -> list[float]:
    """Of each row the summed log-probability, in nats, of the continuation's tokens after the context's.

    A row that is longer than the model's context loses the beginning of its context. Rows are taken by length, padded
    on the right; one doesn't depend on the others, up to rounding.

    Args:
        rows: (context ids, continuation ids), each of at least one token.
        advance: called with the number of rows of a finished batch.

    Raises:
        InputError: a context or a continuation is empty, or a continuation alone fills the model's context.
        PKEError: the model gives NaN or infinite logits.
    """
    limit = context_length(model)
    fitted = [_fitted(list(context), list(ending), limit) for context, ending in rows]
    order = sorted(range(len(fitted)), key=lambda index: -len(fitted[index][0]))
    pad, found = pad_token_id(tokenizer, model), [0.0] * len(fitted)
    with evaluating(model):
        start = 0
        while start < len(order):
            longest = len(fitted[order[start]][0])
            batch = order[start : start + max(1, TOKENS_AT_ONCE // longest)]
            for index, value in zip(batch, _batch(model, [fitted[i] for i in batch], pad), strict=True):
                found[index] = value
            start += len(batch)
            if advance is not None:
                advance(len(batch))
    return found


def _fitted(context: list[int], ending: list[int], limit: int | None) -> tuple[list[int], int]:
    """All ids of a row, cut from the left to the limit, and how many of them are the continuation's."""
    if not context or not ending:
        raise InputError("nothing to score", expected="a context and a continuation of at least one token each")
    if limit is not None and len(ending) >= limit:
        raise InputError(
            "a continuation is too long",
            expected=f"fewer than {limit} tokens, the model's context",
            got=f"{len(ending)} tokens",
        )
    ids = context + ending
    return (ids if limit is None else ids[-limit:]), len(ending)


def _batch(model: Any, rows: Sequence[tuple[list[int], int]], pad: int) -> list[float]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, (row, _) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    at = input_device(model)
    logits = model(input_ids=ids.to(at), attention_mask=mask.to(at), use_cache=False).logits
    found = []
    for index, (row, count) in enumerate(rows):
        part = logits[index, len(row) - count - 1 : len(row) - 1].float().log_softmax(-1)  # [count, V]
        wanted = torch.tensor(row[-count:], device=part.device)
        found.append(float(part.gather(1, wanted[:, None]).sum()))
    if not torch.isfinite(torch.tensor(found)).all():
        raise PKEError("the model gives NaN or infinite logits", do="evaluate in fp32 or bf16")
    return found


def joined(tokenizer: Any, context: str, ending: str, special: bool = True) -> Row:
    """Token ids of a context and of what follows it, tokenized together and cut where the context ends.

    Args:
        special: let the tokenizer add the tokens that a text begins with.
    """
    head = list(tokenizer(context, add_special_tokens=special)["input_ids"])
    whole = list(tokenizer(context + ending, add_special_tokens=special)["input_ids"])
    if whole[: len(head)] == head and len(whole) > len(head):
        return head, whole[len(head) :]
    # A tokenizer that merges across the seam, or ends a text with a token of its own: the ending is tokenized alone.
    return head, list(tokenizer(ending, add_special_tokens=False)["input_ids"])
