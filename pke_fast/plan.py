"""What a job's sequences are like, and the plan that is made for them: sizes, pace, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from pke_fast.encoding import Encoded, shared
from pke_fast.pace import Pace


@dataclass(frozen=True)
class Load:
    """What a job's sequences are like.

    Attributes:
        requests, locality: how many sequences of each are scored and edited.
        request_tokens, locality_tokens: of all of either side together.
        answer: most supervised tokens of a sequence: its answer's, and those held in its prompt.
        held: supervised tokens of all locality sequences.
        request_widths, locality_widths: which lengths there are, ascending.
        begun: tokens that all begin with, which an edit runs once.
        scored_widths: the requests' while they are scored; none where they are the same.
        together: how many sequences score a request, in one batch; the longest has its width.
    """

    requests: int
    locality: int
    request_tokens: int
    locality_tokens: int
    answer: int
    request_widths: tuple[int, ...]
    locality_widths: tuple[int, ...] = ()
    begun: int = 0
    held: int = 0
    scored_widths: tuple[int, ...] = ()
    together: int = 1

    @classmethod
    def of(
        cls, requests: Sequence[Encoded], locality: Sequence[Encoded], scored: Sequence[Sequence[Encoded]] = ()
    ) -> Load:
        """Of an edit's sequences, and those that score together, request by request, where they are others."""
        every = [*requests, *locality]
        return cls(
            len(requests),
            len(locality),
            sum(len(sequence.ids) for sequence in requests),
            sum(len(sequence.ids) for sequence in locality),
            max(len(sequence.supervised) for sequence in (*every, *chain.from_iterable(scored))),
            tuple(sorted({len(sequence.ids) for sequence in requests})),
            tuple(sorted({len(sequence.ids) for sequence in locality})),
            len(shared(every)),
            sum(len(sequence.supervised) for sequence in locality),
            tuple(sorted({max(len(sequence.ids) for sequence in group) for group in scored})),
            max((len(group) for group in scored), default=1),
        )

    def after(self, begun: int) -> Load:
        """The same without so many tokens at the beginning of each sequence."""
        return replace(
            self,
            request_tokens=self.request_tokens - begun * self.requests,
            locality_tokens=self.locality_tokens - begun * self.locality,
            request_widths=tuple(width - begun for width in self.request_widths),
            locality_widths=tuple(width - begun for width in self.locality_widths),
            begun=self.begun - begun,
        )

    def reached(self, requests: int, locality: int) -> Load:
        """The same of so many of the requests and of the locality pairs, each of its side's mean length."""
        return replace(
            self,
            requests=requests,
            locality=locality,
            request_tokens=math.ceil(self.request_length * requests),
            locality_tokens=math.ceil(self.locality_length * locality),
            held=self.held * locality // max(1, self.locality),
        )

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.request_tokens + self.locality_tokens

    @property
    def request_length(self) -> float:
        """Mean tokens of a request."""
        return self.request_tokens / max(1, self.requests)

    @property
    def locality_length(self) -> float:
        """Mean tokens of a locality pair."""
        return self.locality_tokens / max(1, self.locality)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.request_widths[-1:] + self.locality_widths[-1:])


@dataclass(frozen=True)
class Residence:
    """Which weights are on the device while a job runs: all of them, or not.

    Attributes:
        offloads: the lowest layers may wait with the host, and come when they are used (`offloading`).
        pinnable: bytes of them that the host can pin.
        away: bytes that accelerate's hooks bring, a layer at a time.
        kept_from: the lowest layer that may keep its graph; `away` had better not be kept.
    """

    offloads: bool = False
    pinnable: int = 0
    away: int = 0
    kept_from: int = 0


ALL_THERE = Residence()


@dataclass(frozen=True)
class Plan:
    """How a job is run, and what memory that takes. Sizes are in bytes.

    Attributes:
        budget: what may be used in all; None where nobody knows.
        layers: of the model.
        tokens, scoring_kept, editing_kept: as of `Pace`, in numbers.
        process: what the process holds besides: Python and its libraries, on a CPU.
        weights: of the model, those that have to be in memory.
        on_disk: weights besides, which stay in their file and are read whenever they are used.
        scores: the score maps while they are made.
        scoring: what a micro-batch takes while scores are made.
        cache: what the steps need of every sequence: its tape, up to the lowest edited layer; of locality pairs, the
            last states too, of the unedited model and as the steps hold them.
        columns: the hot spots: old values, in the weights' own dtype too, masters, two moments.
        step: what an edit step takes besides.
        scoring_flops, editing_flops: floating-point operations of the layers and the logits in all.
        offloaded: weights besides that come to the device when they are used.
        layers_offloaded, pinned: how many of the lowest layers those are, and how many of them, the uppermost, wait in
            pinned memory; the others wait where they are, in the host's memory or their mapped file.
        staging: room for the layers that are there just then.
        brought: bytes that are copied to the device in all.
        detectors: what the edit's closed-form beginning keeps and takes (`detectors`); on a GPU, over a step.
        answering: of a token in flight, while the model answers prompts; 0 where nobody knows.
    """

    budget: int | None
    layers: int
    tokens: int
    scoring_kept: int
    editing_kept: int
    process: int
    weights: int
    on_disk: int
    scores: int
    scoring: int
    cache: int
    columns: int
    step: int
    scoring_flops: float
    editing_flops: float
    offloaded: int = 0
    layers_offloaded: int = 0
    pinned: int = 0
    staging: int = 0
    brought: int = 0
    detectors: int = 0
    answering: int = 0

    @property
    def locating(self) -> int:
        """The most memory over the weights while hot spots are located."""
        return self.scores + self.scoring

    @property
    def editing(self) -> int:
        """The same while they are edited."""
        return self.cache + self.columns + self.detectors + self.step

    @property
    def peak(self) -> int:
        return self.fixed + max(self.locating, self.editing)

    @property
    def fixed(self) -> int:
        """What is in use all the time."""
        return self.process + self.weights + self.staging

    @property
    def room(self) -> int:
        """What the budget leaves over the weights; 0 where there is none."""
        return 0 if self.budget is None else self.budget - self.fixed

    def at_once(self, most: int) -> int:
        """Of so many tokens, how many may be in flight while the model answers prompts.

        They take no more memory than locating or editing does, so that the peak is theirs.
        """
        return min(most, max(self.locating, self.editing) // self.answering) if self.answering else most

    def pace(self) -> Pace:
        return Pace(self.tokens, self.scoring_kept, self.editing_kept)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        sizes = (
            "process",
            "weights",
            "on_disk",
            "offloaded",
            "staging",
            "brought",
            "scores",
            "scoring",
            "cache",
            "columns",
            "detectors",
            "step",
            "locating",
            "editing",
            "peak",
        )
        return {
            "budget": self.budget,
            "micro_batch_tokens": self.tokens,
            "layers that keep their graph": {"scoring": self.scoring_kept, "editing": self.editing_kept},
            "layers offloaded": {"pinned": self.pinned, "as they are": self.layers_offloaded - self.pinned},
            "bytes": {name: getattr(self, name) for name in sizes},
        }
