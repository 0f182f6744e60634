"""Perplexity of a text under a model: how much an edit costs the model on ordinary prose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pke_fast.errors import InputError, PKEError
from pke_fast.modes import evaluating
from pke_fast.placement import input_device

MAX_TOKENS = 20_000
# Tokens in a window. The model makes a window's logits at once: 512 x V numbers, 131 MB in bf16 at V = 128,000.
WINDOW = 512
CHUNK = 128  # positions whose log-probabilities are computed in fp32 at a time


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    max_tokens: int = MAX_TOKENS,
    window: int = WINDOW,
    advance: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, in windows that don't overlap.

    Every token but the first of a window is predicted from those before it in the window.

    Args:
        max_tokens: tokens of the text that count, from its beginning.
        window: tokens in a window; never more than the model's context.
        advance: called with the number of tokens in a finished window.

    Raises:
        InputError: the text has fewer than 2 tokens.
        PKEError: the model gives NaN or infinite logits.
    """
    windows = text_windows(model, tokenizer, text, max_tokens=max_tokens, window=window)
    return windows_perplexity(model, windows, advance=advance)


def text_windows(
    model: Any, tokenizer: Any, text: str, *, max_tokens: int = MAX_TOKENS, window: int = WINDOW
) -> list[list[int]]:
    """A text's first tokens in windows of 2 ids and more.

    Where the tokenizer begins a text with a token of its own, as Llama's and Gemma's do, each window begins with it:
    such models are lost without it.

    Raises:
        InputError: the text has fewer than 2 tokens.
    """
    from pke_fast.loading import context_length

    window = min(window, context_length(model) or window)
    # verbose=False: no warning that the text is longer than the context; it is cut here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    begin = tokenizer.bos_token_id
    head = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []
    step = window - len(head)
    windows = [[*head, *ids[start : start + step]] for start in range(0, len(ids), step)]
    windows = [ids for ids in windows if len(ids) > 1]  # nothing to predict in a last window of one token
    if not windows or len(ids) < 2:
        raise InputError(
            "the text is too short for a perplexity", expected="at least 2 tokens", got=f"{len(ids)} in {text[:40]!r}"
        )
    return windows


def windows_perplexity(
    model: Any, windows: Sequence[Sequence[int]], *, advance: Callable[[int], None] | None = None
) -> float:
    """Perplexity over windows of token ids, as `perplexity` defines it."""
    return losses_perplexity(windows_losses(model, windows, advance=advance))


def windows_losses(
    model: Any, windows: Sequence[Sequence[int]], *, advance: Callable[[int], None] | None = None
) -> list[tuple[float, int]]:
    """Of each window the summed negative log-likelihood in nats and the number of tokens that were predicted."""
    losses = []
    with evaluating(model):
        for window in windows:
            ids = torch.tensor([list(window)], device=input_device(model))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # [T - 1, V]
            targets, total = ids[0, 1:].to(logits.device), 0.0
            for start in range(0, len(targets), CHUNK):
                part, wanted = logits[start : start + CHUNK].float(), targets[start : start + CHUNK]
                total += float(torch.nn.functional.cross_entropy(part, wanted, reduction="sum"))
            if not math.isfinite(total):
                raise PKEError(
                    "the perplexity isn't a number: the model gives NaN or infinite logits",
                    got=f"a negative log-likelihood of {total} over {len(targets)} tokens",
                    do="evaluate in fp32 or bf16; if it is the same there, the model is damaged",
                )
            losses.append((total, len(targets)))
            if advance is not None:
                advance(len(window))
    return losses


def losses_perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """The perplexity of windows whose losses and lengths are known; at least one."""
    mean = torch.tensor(sum(loss for loss, _ in losses) / sum(count for _, count in losses), dtype=torch.float64)
    return float(mean.exp())
