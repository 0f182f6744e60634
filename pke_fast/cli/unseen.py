"""What an edit does to prompts that it hasn't seen, measured before and after it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pke_fast import engine, shipped
from pke_fast.config import PKEConfig
from pke_fast.drawn import Drawn, drawn_of, reserves_of
from pke_fast.evaluating.paired import differences
from pke_fast.evaluation import Evaluation, by_category
from pke_fast.judges import JUDGES
from pke_fast.loading import LoadedModel
from pke_fast.requests import EditRequest
from pke_fast.stages import Stages

ANSWER_TOKENS = 32
HELD_OUT = 0.1  # share of the requests, where nothing is said
MOST = 48  # requests that are held out of an edit: more would measure more finely, and teach it less


def hold_out(requests: Sequence[EditRequest], share: float, seed: int) -> tuple[Drawn[EditRequest], list[EditRequest]]:
    """The requests to edit on, and a share that is held out, drawn by the seed; both in the order that they came in.

    A prompt that comes several times is on one side alone, and counts once.
    """
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    of_all = share * drawn_of(requests) / max(1, len(requests))  # where more were given than drawn
    held = set(random.Random(seed).sample(prompts, min(MOST, int(of_all * len(prompts)), len(prompts))))
    sides: tuple[list[EditRequest], list[EditRequest]] = ([], [])
    for request in requests:
        sides[request.prompt in held].append(request)
    rest, kept_out = sides
    reserves = [request for request in reserves_of(requests) if request.prompt not in held]
    return Drawn(rest, drawn_of(requests) - len(kept_out), reserves), kept_out


def harmless(limit: int | None = None) -> list[str]:
    """The shipped harmless prompts that no edit sees: plain ones, and some that only look harmful."""
    return [*shipped.benign_held_out()[:limit], *shipped.look_alikes_held_out()[:limit]]


@dataclass
class Unseen:
    """Measures the same prompts twice: `measure` before the edit, and after it.

    Attributes:
        harmful, benign: prompts that aren't edited on.
        text: for the perplexity.
        categories: of harm, by prompt, as far as they are known.
        done: the evaluations so far.
    """

    loaded: LoadedModel
    config: PKEConfig
    stages: Stages
    harmful: Sequence[str]
    benign: Sequence[str]
    text: str | None = None
    categories: Mapping[str, str] = field(default_factory=dict)
    done: list[Evaluation] = field(default_factory=list)

    def measure(self, when: str) -> None:
        """Evaluates the model as it is. Raises `InputError` for a prompt that can't be used."""
        found = engine.evaluate(
            self.loaded.model,
            self.loaded.tokenizer,
            self.harmful,
            self.benign,
            self.text,
            self.config,
            judges=list(JUDGES),
            max_new_tokens=ANSWER_TOKENS,
            stages=self.stages,
            when=when,
        )
        self.done.append(found)

    def compared(self) -> dict[str, Any]:
        """Before, after and the paired difference, as a report keeps them under `evaluation`; and both by category."""
        before, after = self.done
        figures = before.as_dict(), after.as_dict()
        changed = differences(*figures, before.generations, after.generations)
        old, new = (by_category(evaluation.generations, self.categories) for evaluation in self.done)
        categories = {name: {"before": old[name], "after": new[name]} for name in old}
        return {"before": figures[0], "after": figures[1], "difference": changed, "by_category": categories}
