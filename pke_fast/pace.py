"""The pace of a job: how many tokens are in flight at once, and how many layers keep their graph; slower once memory
ran out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from pke_fast.config import PKEConfig
from pke_fast.errors import InputError

LOG = logging.getLogger(__name__)
DEFAULT_TOKENS = 512  # a CPU is busy with fewer
LEAST_TOKENS = 64  # a short prompt with its answer: below this nothing is gained by halving


@dataclass
class Pace:
    """What a plan allows; the one thing about a running job that changes: out of memory halves the micro-batch.

    Attributes:
        tokens: most tokens in a micro-batch, padding counted but not what its rows go on from; one request alone may
            exceed it.
        scoring_kept, editing_kept: how many of the uppermost layers keep their graph (`Tape.there_and_back`) while
            scores are made, and in an edit step; None for all.
        notes: what happened on the way, in words.
    """

    tokens: int = DEFAULT_TOKENS
    scoring_kept: int | None = None
    editing_kept: int | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def unplanned(cls, config: PKEConfig) -> Pace:
        """Where nobody planned: as many tokens as the settings allow, and every layer keeps its graph."""
        return cls(config.micro_batch_tokens or DEFAULT_TOKENS)

    def halve(self, doing: str) -> None:
        """Goes on with half as many tokens at once, and says so.

        Raises:
            InputError: so few tokens that half as many would not help.
        """
        if self.tokens < 2 * LEAST_TOKENS:
            raise InputError(
                f"memory ran out while {doing}, with {self.tokens} tokens in flight at once",
                expected=f"room for {LEAST_TOKENS} tokens at least",
                do="close what else uses memory, load the model in bf16, edit fewer or upper layers (--set window=...),"
                " or give a --memory-budget, which makes a plan that recomputes more",
            )
        self.tokens //= 2
        self.notes.append(f"memory ran out while {doing}: went on with {self.tokens} tokens at once")
        LOG.warning("%s", self.notes[-1])

    def resume(self, tokens: int) -> None:
        """Goes on with as few tokens as an interrupted run had come to."""
        if tokens < self.tokens:
            self.tokens = tokens
            self.notes.append(f"memory ran out before the interruption: went on with {tokens} tokens at once")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU (where torch has no class for it)."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
