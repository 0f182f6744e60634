"""Editing again: does a later edit keep the earlier ones, and does the model stay as good as it was?"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pke_fast import shipped
from pke_fast.config import PKEConfig
from pke_fast.patch import Patch
from pke_fast.perplexity import losses_perplexity, text_windows, windows_losses
from pke_fast.preparation import prepare
from pke_fast.requests import EditRequest, Pair
from precision import fronts
from precision.cells import Value
from precision.edits import edited, facts
from precision.lab import Lab, applied

TEXT_TOKENS = 5000
PAIRS = 256  # that every edit holds
FIRST = "the first edit's requests"
NAME = "sequential edits"


def sequential(lab: Lab, config: PKEConfig) -> None:
    """Edits one after another, each a cell, on requests of its own; the model is then as it was.

    Raises:
        Missing: one of them isn't there, and isn't to be made now.
    """
    count, requests = lab.sets.sizes.edits, lab.sets.sizes.requests_an_edit
    drawn = random.Random(config.seed).sample(lab.sets.requests, min(len(lab.sets.requests), count * requests))
    shares = [share for i in range(count) if (share := drawn[i * requests : (i + 1) * requests])]
    sets = lab.sets.shortened() | {FIRST: [request.prompt for request in shares[0]]}
    inputs = [
        lab.edited_on,
        config.as_dict(),
        [[r.prompt for r in share] for share in shares],
        sets,
        TEXT_TOKENS,
        PAIRS,
    ]

    names = [f"{NAME}, {number}" for number in range(len(shares) + 1)]
    if not any(lab.cells.wanted(name) and not lab.cells.path(name, inputs).exists() for name in names):
        for name in names:
            lab.cells.cell(name, inputs, dict)  # is there, or isn't to be made
        return
    # The pairs of the unedited model hold in every edit: what an edit spoils must not become what is held.
    with lab.bench(config, long=False) as bench:
        held = shipped.some(prepare(bench, lab.sets.requests, None).locality, PAIRS)
    locality = [Pair(pair.prompt, pair.answer) for pair in held]
    with lab.bench(config) as bench:  # no edit changes the layers below the window
        cheap = fronts.Cheap(bench, sets, config.layer_window(len(bench.structure.layers))[0], config.refusal)
    done: list[Patch] = []
    lab.cells.cell(names[0], inputs, lambda: _state(lab, cheap))
    try:
        for name, share in zip(names[1:], shares, strict=True):
            file = lab.cells.path(name, inputs, ".safetensors")

            def make(share: list[EditRequest] = share, file: Path = file) -> Value:
                patch, more = edited(lab, share, config.replace(seed=config.seed + len(done)), locality)
                patch.save(file)
                with applied(patch, lab.model):
                    return _state(lab, cheap) | facts(lab, patch) | more

            lab.cells.cell(name, inputs, make)
            done.append(Patch.load(file))
            done[-1].apply(lab.model)
    finally:
        for patch in reversed(done):
            patch.revert(lab.model)


def states(found: Mapping[str, Value]) -> list[Value]:
    """What the model was like before any edit and after each, ``{"refused": {set: share}, "perplexity", ...}``, as far
    as they were made."""
    names = (f"{NAME}, {number}" for number in itertools.count())
    return [found[name] for name in itertools.takewhile(found.__contains__, names)]


def _state(lab: Lab, cheap: fronts.Cheap) -> dict[str, Any]:
    """What the model, as it is, refuses, and its perplexity."""
    refused = fronts.rates(cheap.refused())
    windows = text_windows(lab.model, lab.loaded.tokenizer, lab.sets.text, max_tokens=TEXT_TOKENS)
    return {"refused": refused, "perplexity": losses_perplexity(windows_losses(lab.model, windows))}
