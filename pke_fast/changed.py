"""What changed between two answers, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

Piece = tuple[str, bool]  # a part of an answer, and whether the other answer lacks it

_WORD = re.compile(r"\S+")


def changed_words(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Both answers in pieces, which joined give them back to the letter. Spaces and lines aren't compared."""
    old, new = (list(_WORD.finditer(text)) for text in (before, after))
    matcher = SequenceMatcher(None, [word.group() for word in old], [word.group() for word in new], autojunk=False)
    codes = matcher.get_opcodes()
    first = _pieces(before, old, [(start, end, code != "equal") for code, start, end, _, _ in codes])
    return first, _pieces(after, new, [(start, end, code != "equal") for code, _, _, start, end in codes])


def _pieces(text: str, words: Sequence[re.Match[str]], runs: Sequence[tuple[int, int, bool]]) -> list[Piece]:
    """The text cut at runs of words; the space between two runs is of neither."""
    pieces, done = [], 0
    for start, end, changed in runs:
        if start < end:
            first, last = words[start].start(), words[end - 1].end()
            pieces += [(text[done:first], False), (text[first:last], changed)]
            done = last
    return [piece for piece in [*pieces, (text[done:], False)] if piece[0]]
