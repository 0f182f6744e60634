"""The requests and the benign pairs that a command is given, as many as its job comes to."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pke_fast.config import PKEConfig
from pke_fast.drawn import Drawn, draw_for
from pke_fast.ranks import first_rank
from pke_fast.requests import EditRequest, Pair, stream_pairs, stream_requests
from pke_fast.stages import Stages

T = TypeVar("T")

LARGE = 2**26  # bytes of a file whose reading shows its progress: some seconds
AT_ONCE = 1000  # records between two looks of the progress bar


def read_for(
    options: Namespace, config: PKEConfig, *, edits: bool, beside: int = 0
) -> tuple[Drawn[EditRequest], Drawn[Pair] | None]:
    """What `--requests` and `--locality` give, drawn as of `draw_for`. Both are read, and checked, to their end.

    Raises:
        InputError: a file can't be used, or holds a record that can't be.
    """
    files = [file for file in (options.requests, options.locality) if file]
    large = any(Path(file).is_file() and Path(file).stat().st_size > LARGE for file in files)
    with Stages(show=None if large and first_rank() else False).stage("Reading requests and pairs") as advance:
        requests = _told(stream_requests(options.requests, options.limit), advance)
        pairs = _told(stream_pairs(options.locality, options.limit), advance) if options.locality else None
        return draw_for(config, requests, pairs, edits=edits, beside=beside)


def _told(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    for count, item in enumerate(items, start=1):
        yield item
        if count % AT_ONCE == 0:
            advance(AT_ONCE)
