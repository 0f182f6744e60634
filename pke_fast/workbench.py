"""A model laid out for work: frozen, in eval mode, its structure found; everything as it was when the work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.fingerprint import fingerprint
from pke_fast.generation import generate
from pke_fast.loading import check_finite, context_length, pad_token_id
from pke_fast.stages import Stages
from pke_fast.structure import Structure, find_structure


@dataclass(frozen=True, eq=False)
class Workbench:
    """What every job needs: the model and its structure, the tokenizer, the settings, the clock.

    Attributes:
        name: what the user called the model.
    """

    model: Any
    tokenizer: Any
    config: PKEConfig
    stages: Stages
    name: str
    structure: Structure
    encoder: PromptEncoder
    pad_id: int

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are when it is first asked for."""
        return fingerprint(self.model)

    def answers(self, prompts: list[str], tokens: int, doing: str) -> list[str]:
        """The model's own greedy answers, at most so many tokens each."""
        with self.stages.stage(doing, len(prompts)) as advance:
            return generate(self.model, self.tokenizer, self.encoder, prompts, max_new_tokens=tokens, advance=advance)


@contextmanager
def workbench(
    model: Any, tokenizer: Any, config: PKEConfig, stages: Stages | None = None, name: str | None = None
) -> Iterator[Workbench]:
    """Lays a model out, and puts its training mode and its parameters' requires_grad back in the end.

    Raises:
        InputError: the model's structure isn't known, or a weight isn't finite.
    """
    stages = stages or Stages(device=str(next(model.parameters()).device))
    training = model.training
    wanted_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in wanted_grad:
        parameter.requires_grad_(False)
    try:
        check_finite(model)
        yield Workbench(
            model,
            tokenizer,
            config,
            stages,
            name or getattr(model.config, "name_or_path", "") or type(model).__name__,
            find_structure(model),
            PromptEncoder(tokenizer, config, context_length(model)),
            pad_token_id(tokenizer, model),
        )
    finally:
        model.train(training)
        for parameter, wanted in wanted_grad:
            parameter.requires_grad_(wanted)
