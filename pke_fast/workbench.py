"""A model laid out for work: frozen, in eval mode, its structure found; everything as it was when the work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pke_fast.choice import using
from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.fingerprint import fingerprint
from pke_fast.generation import TOKENS_AT_ONCE, generate
from pke_fast.loading import check_finite, context_length, pad_token_id, resolve_device
from pke_fast.modes import eval_mode
from pke_fast.offloading import brought_to
from pke_fast.pace import Pace
from pke_fast.placement import check_placement, input_device
from pke_fast.plan import Plan
from pke_fast.ranks import ALONE, Ranks
from pke_fast.resume import Resume
from pke_fast.spilling import spill
from pke_fast.stages import Stages
from pke_fast.structure import Structure, find_structure


@dataclass(frozen=True, eq=False)
class Workbench:
    """What every job needs: the model and its structure, the tokenizer, the settings, the clock.

    Attributes:
        name: what the user called the model.
        pace: of the job, as its plan says; it slows down where memory runs out.
        ranks: the processes that share the job.
        resume: where its state is kept.
        device: where the work is done; where tokens go, of a model that is spread.
        placing: what ends with the bench: a model that was brought to the device is put back.
        answering: most tokens in flight while the model answers prompts.
    """

    model: Any
    tokenizer: Any
    config: PKEConfig
    stages: Stages
    name: str
    encoder: PromptEncoder
    pad_id: int
    pace: Pace
    ranks: Ranks = ALONE
    resume: Resume = field(default_factory=Resume)
    device: str = "cpu"
    placing: ExitStack = field(default_factory=ExitStack)
    answering: int = TOKENS_AT_ONCE

    @cached_property
    def structure(self) -> Structure:
        """Found when it is first asked for: a model that is only evaluated needs none."""
        return find_structure(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are when it is first asked for."""
        return fingerprint(self.model)

    def going(self, pace: Pace, resume: Resume, answering: int = TOKENS_AT_ONCE) -> Workbench:
        """The same bench at a pace, with its state kept; what was found out on this one isn't sought again."""
        bench = replace(self, pace=pace, resume=resume, answering=answering)
        found = {name: value for name, value in vars(self).items() if name in ("structure", "fingerprint")}
        vars(bench).update(found)
        return bench

    def place(self, plan: Plan | None, folder: str | Path | None = None) -> None:
        """Brings the model to the device, if it isn't there, as the plan says, until the bench is put away.

        Args:
            folder: gets the weights of offloaded layers that aren't pinned and lie in no file (`spill`); None: they
                stay in the host's memory.
        """
        lowest, pinned = (plan.layers_offloaded, plan.pinned) if plan else (0, 0)
        if folder is not None:
            spill(list(self.structure.layers)[: lowest - pinned], folder)
        if lowest or self.device != str(self.structure.device):
            device = torch.device(self.device)
            self.placing.enter_context(brought_to(self.model, self.structure.layers, device, lowest, pinned))

    def answers(self, prompts: list[str], tokens: int, doing: str) -> list[str]:
        """The model's own greedy answers, at most so many tokens each."""
        share = self.ranks.mine(prompts)
        with self.stages.stage(doing, len(share)) as advance:
            return self.resume.remembered(
                doing,
                lambda: self.ranks.gathered(
                    generate(
                        self.model,
                        self.tokenizer,
                        self.encoder,
                        share,
                        max_new_tokens=tokens,
                        tokens_at_once=self.answering,
                        advance=advance,
                    )
                    if share
                    else []
                ),
            )


@contextmanager
def laid_out(model: Any) -> Iterator[str]:
    """Freezes a model in eval mode, and puts its modes and its parameters' requires_grad back; yields its device.

    Raises:
        InputError: a weight isn't finite, or the weights lie in a way that can't be worked with (`check_placement`).
    """
    check_placement(model)
    wanted_grad = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        check_finite(model)
        with eval_mode(model):
            yield str(input_device(model))
    finally:
        for name, wanted in wanted_grad:  # by name: accelerate's hooks make parameters anew
            model.get_parameter(name).requires_grad_(wanted)


def name_of(model: Any, name: str | None = None) -> str:
    """What a model is called where its user didn't say: its checkpoint's name, else its class's."""
    return name or getattr(model.config, "name_or_path", "") or type(model).__name__


@contextmanager
def workbench(
    model: Any,
    tokenizer: Any,
    config: PKEConfig,
    stages: Stages | None = None,
    name: str | None = None,
    *,
    ranks: Ranks = ALONE,
    device: str | None = None,
) -> Iterator[Workbench]:
    """Lays a model out for the length of a block; raises as `laid_out` does.

    Args:
        device: where the work will be done (`Workbench.place`); None: where the model is.
    """
    device = None if device is None else resolve_device(device)
    with laid_out(model) as where, using(config.backend), ExitStack() as placing:
        yield Workbench(
            model,
            tokenizer,
            config,
            stages or Stages(device=device or where),
            name_of(model, name),
            PromptEncoder(tokenizer, config, context_length(model), len(model.get_input_embeddings().weight)),
            pad_token_id(tokenizer, model),
            Pace.unplanned(config),
            ranks,
            Resume(),
            device or where,
            placing,
        )
