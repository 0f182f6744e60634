"""KL to the base model: how far an edit moved what the model would say where nothing should move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pke_fast.encoding import Encoded
from pke_fast.errors import PKEError
from pke_fast.intervals import listed, mean_interval
from pke_fast.modes import evaluating
from pke_fast.patch import Patch
from pke_fast.placement import input_device

FIRST_TOKENS = 8  # of a benign answer: it is there that refusing and answering part


@contextmanager
def without(patch: Patch, model: Any) -> Iterator[None]:
    """The model without a patch that is applied; it is applied again afterwards, exact to the bit."""
    patch.revert(model)
    try:
        yield
    finally:
        patch.apply(model)


def divergence_from_base(
    model: Any, patch: Patch, sequences: Sequence[Encoded], *, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Mean KL(base ‖ patched), in nats a token, at the positions that predict the answers of sequences.

    Args:
        model: with the patch applied, as it is again afterwards.
        sequences: prompts with answers, at least one; the whole answer counts.
        advance: called with the number of finished sequences.

    Returns:
        ``{"n", "kl", "interval", "first_token"}``: the mean over sequences of each one's mean over its positions, its
        bootstrap interval over sequences (None of a single one), and the mean of the first positions alone.

    Raises:
        PatchError: the patch isn't applied.
        PKEError: the model gives NaN or infinite logits.
    """
    means, firsts = [], []
    with evaluating(model):
        for sequence in sequences:
            now = _log_probabilities(model, sequence)
            with without(patch, model):
                base = _log_probabilities(model, sequence)
            kl = (base.exp() * (base - now)).sum(-1)  # [answer tokens]
            if not torch.isfinite(kl).all():
                raise PKEError("the KL isn't a number: the model gives NaN or infinite logits", do="evaluate in fp32")
            means.append(float(kl.mean()))
            firsts.append(float(kl[0]))
            if advance is not None:
                advance(1)
    n = len(means)
    interval = listed(mean_interval(means))
    return {"n": n, "kl": math.fsum(means) / n, "interval": interval, "first_token": math.fsum(firsts) / n}


def _log_probabilities(model: Any, sequence: Encoded) -> Tensor:
    """[answer tokens, V] in fp32: what is said of each token of the answer before it is seen."""
    ids = torch.tensor([sequence.ids], device=input_device(model))
    logits = model(input_ids=ids, use_cache=False).logits[0]
    part: Tensor = logits[sequence.prompt_length - 1 : -1].float().log_softmax(-1)
    return part


def windows_as_sequences(windows: Sequence[Sequence[int]]) -> list[Encoded]:
    """Windows of running text as sequences whose answer is all but their first token."""
    return [Encoded(tuple(window), 1) for window in windows]
