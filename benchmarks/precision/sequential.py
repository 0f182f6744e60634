"""Editing again: does a later edit keep the earlier ones, and does the model stay as good as it was?"""

from __future__ import annotations

import random
from typing import Any

from pke_fast.config import PKEConfig
from pke_fast.patch import Patch
from pke_fast.perplexity import losses_perplexity, text_windows, windows_losses
from pke_fast.preparation import prepare
from pke_fast.requests import Pair
from precision import fronts
from precision.cells import Value
from precision.edits import edited, facts
from precision.lab import Lab

TEXT_TOKENS = 5000
FIRST = "the first edit's requests"


def sequential(lab: Lab, config: PKEConfig) -> Value:
    """Edits one after another, each on requests of its own; the model is then as it was.

    Returns:
        ``{"edits": [{"refused": {set: share}, "perplexity", "change", "seconds"}]}``; the first entry is before any.
    """
    count, requests = lab.sets.sizes.edits, lab.sets.sizes.requests_an_edit
    drawn = random.Random(config.seed).sample(lab.sets.requests, min(len(lab.sets.requests), count * requests))
    shares = [drawn[i * requests : (i + 1) * requests] for i in range(count)]
    shares = [share for share in shares if share]
    sets = lab.sets.shortened() | {FIRST: [request.prompt for request in shares[0]]}
    inputs = [lab.edited_on, config.as_dict(), [[r.prompt for r in share] for share in shares], sets, TEXT_TOKENS]

    def make() -> Value:
        with lab.bench(config, long=False) as bench:
            # The pairs of the unedited model hold in every edit: what an edit spoils must not become what is held.
            locality = [Pair(p.prompt, p.answer) for p in prepare(bench, lab.sets.requests, None).locality]
        done: list[Patch] = []
        found = [_state(lab, config, sets)]
        try:
            for share in shares:
                patch, more = edited(lab, share, config.replace(seed=config.seed + len(done)), locality)
                patch.apply(lab.model)
                done.append(patch)
                found.append(_state(lab, config, sets) | facts(lab, patch) | more)
        finally:
            for patch in reversed(done):
                patch.revert(lab.model)
        return {"edits": found}

    return lab.cells.cell("sequential edits", inputs, make)


def _state(lab: Lab, config: PKEConfig, sets: dict[str, list[str]]) -> dict[str, Any]:
    """What the model, as it is, refuses, and its perplexity."""
    with lab.bench(config) as bench:
        refused = fronts.rates(fronts.Cheap(bench, sets, 0, config.refusal).refused())
        windows = text_windows(lab.model, lab.loaded.tokenizer, lab.sets.text, max_tokens=TEXT_TOKENS)
        losses = windows_losses(lab.model, windows)
    return {"refused": refused, "perplexity": losses_perplexity(losses)}
