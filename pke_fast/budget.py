"""A memory budget turned into a micro-batch: how many tokens may be in flight at once.

It counts weights, optimiser state, logits in chunks and one micro-batch; not the cache of the layers below (hidden size
times all tokens), nor what generating answers takes.
"""

from __future__ import annotations

import re

from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.structure import Structure

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
LEAST_TOKENS = 64  # a short prompt with its answer: below this nothing can be edited


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``8G``."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]I?)?B?\s*", text.upper())
    if not match:
        raise InputError(f"can't read the size {text!r}", expected="a number and a unit, such as 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def bytes_per_token(structure: Structure, config: PKEConfig) -> int:
    """An estimate of what one token in flight costs: the graph of the layers of the window, as an edit step keeps it.

    A layer keeps about 4 tensors of D (gate, act(gate), up, h) and 16 of d (norms, attention, residuals) a token.
    """
    first = config.layer_window(len(structure.layers))[0] if config.method == "pke" else 0
    kept = len(structure.layers) - first
    return kept * (4 * structure.neurons + 16 * structure.hidden_size) * structure.dtype.itemsize


def within_budget(structure: Structure, config: PKEConfig, budget: int) -> PKEConfig:
    """The settings with a micro-batch that fits into `budget` bytes beside the weights.

    Raises:
        InputError: the budget is smaller than the least possible, which is named.
    """
    weights = sum(p.numel() * p.element_size() for p in structure.model.parameters())
    neurons = config.k if config.method == "pke" else structure.neurons
    columns = 5 * 4 * neurons * structure.hidden_size  # fp32 old, master, gradient and two moments
    head = 3 * (1 << 24)  # edit_loss: the logits of a chunk, their softmax and gradient
    per_token = bytes_per_token(structure, config)
    tokens = (budget - weights - columns - head) // per_token
    if tokens < LEAST_TOKENS:
        least = weights + columns + head + LEAST_TOKENS * per_token
        raise InputError(
            "the memory budget is too small",
            expected=f"at least {least / 2**30:.2f} GiB for this model (weights {weights / 2**30:.2f} GiB)",
            got=f"{budget / 2**30:.2f} GiB",
            do="raise it, lower k, or load the model in bf16",
        )
    return config.replace(micro_batch_tokens=min(config.micro_batch_tokens, int(tokens)))
