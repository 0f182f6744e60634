"""Of many requests and benign pairs, those that a job comes to by its settings, drawn by the seed.

The others cost nothing: of a stream they aren't kept in memory, and the model is never asked about them. A few more are
drawn as reserves, for requests that the model turns out to refuse already.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pke_fast.config import PKEConfig
from pke_fast.trainer import reached

T = TypeVar("T")
Request = TypeVar("Request")
Pair = TypeVar("Pair")

PROBED = 2048  # prompts of a side by which locating tells how precise an edit can be
RESERVES = 3  # for each item that is drawn


class Drawn(list[T]):
    """Some of what was given, in its order.

    Attributes:
        of: how many there were.
        reserves: others, in the order in which they would have been drawn.
    """

    def __init__(self, items: Iterable[T], of: int, reserves: Sequence[T] = ()) -> None:
        super().__init__(items)
        self.of, self.reserves = of, list(reserves)


def draw(items: Iterable[T], most: int | None, seed: int) -> Drawn[T]:
    """At most so many of the items, each as likely as any other, in one pass that holds a few times as many; None: all.

    What is drawn already is drawn from again: the others become reserves, and how many there were is remembered.
    """
    chance, count = random.Random(f"{seed} drawn {most}"), 0
    kept: list[tuple[int, T]] = []
    room = sys.maxsize if most is None else most * (1 + RESERVES)
    for count, item in enumerate(items, start=1):
        if len(kept) < room:
            kept.append((count, item))
        elif (place := chance.randrange(count)) < room:  # Vitter, ACM TOMS 11 (1985), algorithm R
            kept[place] = count, item
    if most is not None and len(kept) > most:
        chance.shuffle(kept)
    chosen = sorted(kept[:most], key=lambda numbered: numbered[0])
    of, earlier = (items.of, items.reserves) if isinstance(items, Drawn) else (count, [])
    return Drawn((item for _, item in chosen), of, [*(item for _, item in kept[len(chosen) :]), *earlier])


def drawn_of(items: Sequence[Any]) -> int:
    """How many there were: of these, or of those that these were drawn from."""
    return items.of if isinstance(items, Drawn) else len(items)


def reserves_of(items: Sequence[T]) -> list[T]:
    """What is left to be drawn next."""
    return items.reserves if isinstance(items, Drawn) else []


def draw_for(
    config: PKEConfig,
    requests: Iterable[Request],
    locality: Iterable[Pair] | None,
    *,
    edits: bool,
    beside: int = 0,
) -> tuple[Drawn[Request], Drawn[Pair] | None]:
    """The requests and the benign pairs that a job comes to: those that it scores, that its steps come to, that it is
    begun and measured with. Methods that go through every request get all.

    Args:
        edits: whether it also edits, or only locates.
        beside: so many requests more, that will be held out.
    """
    most: tuple[int | None, int | None] = None, None
    if config.method == "pke":
        steps, pairs = reached(config, sys.maxsize, sys.maxsize) if edits else (PROBED, PROBED)
        most = max(config.score_requests, steps) + beside, max(config.score_pairs, pairs)
    drawn = draw(requests, most[0], config.seed)
    return drawn, None if locality is None else draw(locality, most[1], config.seed)
