"""The pace of a job: how many tokens are in flight at once, and how many layers keep their graph; slower once memory
ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from pke_fast.batches import Batch
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.memory import is_out_of_memory

T = TypeVar("T")
LOG = logging.getLogger(__name__)
DEFAULT_TOKENS = 512  # a CPU is busy with fewer
LEAST_TOKENS = 64  # a short prompt with its answer: below this nothing is gained by halving
BEFORE = -(2**31)  # the place of all that comes before an edit
LESS = (
    "close what else uses memory, load the model in bf16, edit fewer or upper layers (--set window=...),"
    " or give a --memory-budget, which makes a plan that recomputes more"
)


@dataclass
class Pace:
    """What a plan allows; the one thing about a running job that changes: out of memory halves the micro-batch.

    Attributes:
        tokens: most tokens in a micro-batch, padding counted but not what its rows go on from; one request alone may
            exceed it.
        scoring_kept, editing_kept: how many of the uppermost layers keep their graph (`Tape.there_and_back`) while
            scores are made, and in an edit step; None for all.
        notes: what happened on the way, in words.
        halvings: where it was halved, in an interrupted run too, and to how many tokens. A place is a number that only
            grows while a job runs, and is the same in each run of it.
        keep: called once it is halved.
    """

    tokens: int = DEFAULT_TOKENS
    scoring_kept: int | None = None
    editing_kept: int | None = None
    notes: list[str] = field(default_factory=list)
    halvings: list[tuple[int, int]] = field(default_factory=list)
    keep: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @classmethod
    def unplanned(cls, config: PKEConfig) -> Pace:
        """Where nobody planned: as many tokens as the settings allow, and every layer keeps its graph."""
        return cls(config.micro_batch_tokens or DEFAULT_TOKENS)

    def halve(self, doing: str, place: int = BEFORE) -> None:
        """Goes on with half as many tokens at once, and says so.

        Raises:
            InputError: so few tokens that half as many would not help.
        """
        if self.tokens < 2 * LEAST_TOKENS:
            raise InputError(
                f"memory ran out while {doing}, with {self.tokens} tokens in flight at once",
                expected=f"room for {LEAST_TOKENS} tokens at least",
                do=LESS,
            )
        self.tokens //= 2
        self.notes.append(f"memory ran out while {doing}: went on with {self.tokens} tokens at once")
        LOG.warning("%s", self.notes[-1])
        self.halvings.append((place, self.tokens))
        self.keep()

    def slower_if_it_must(self, work: Callable[[], T], doing: str, place: int = BEFORE) -> T:
        """What `work` returns; where memory runs out it begins anew, with half as many tokens at once.

        Raises:
            InputError: as `halve`.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.halve(doing, place)  # here, since the exception holds on to the memory

    def resume(self, tokens: int) -> bool:
        """Goes on with as few tokens as an interrupted run had come to; whether these are fewer."""
        if tokens >= self.tokens:
            return False
        self.tokens = tokens
        self.notes.append(f"memory ran out before the interruption: went on with {tokens} tokens at once")
        return True

    def resume_at(self, place: int) -> bool:
        """The same, of what an interrupted run had come to at this place."""
        return self.resume(min((tokens for at, tokens in self.halvings if at <= place), default=self.tokens))


@contextmanager
def in_flight(batch: Batch) -> Iterator[None]:
    """While a micro-batch is worked on.

    Raises:
        InputError: memory ran out for one request alone: fewer tokens at once would not help.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if len(set(batch.groups)) > 1 or not is_out_of_memory(error):
            raise
        raise InputError(
            "memory ran out with a single request or benign pair in flight",
            got=f"{batch.input_ids.numel()} tokens",
            do=f"leave it out, or {LESS}",
        ) from error


def told_once(advance: Callable[[int], None]) -> Callable[[], Callable[[int], None]]:
    """For work that may begin anew: gives it an `advance` for each time, which doesn't count again what was counted."""
    shown = 0

    def begin() -> Callable[[int], None]:
        done = 0

        def more(count: int) -> None:
            nonlocal done, shown
            done += count
            advance(max(0, done - shown))
            shown = max(shown, done)

        return more

    return begin
