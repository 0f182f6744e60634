"""What changed between two answers: the words that the other lacks, and the answers whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pke_fast.changed import changed_words


@pytest.mark.parametrize(
    ("before", "after", "marked"),
    [
        ("Hello there", "Hello you", ["Hello [there]", "Hello [you]"]),
        ("a b", "a b", ["a b", "a b"]),
        ("a  b\n", "a b", ["a  b\n", "a b"]),  # spaces are no change
        ("", "No.", ["", "[No.]"]),
        (" one\ntwo, three ", "three, three", [" [one\ntwo,] three ", "[three,] three"]),
        ("Sure, it is so", "It is not so", ["[Sure, it] is so", "[It] is [not] so"]),
    ],
)
def test_words_that_the_other_lacks(before: str, after: str, marked: list[str]) -> None:
    sides = changed_words(before, after)
    assert ["".join(f"[{text}]" if changed else text for text, changed in side) for side in sides] == marked


@given(st.text(alphabet="ab \n", max_size=12), st.text(alphabet="ab \n", max_size=12))
def test_pieces_joined_are_the_answers(before: str, after: str) -> None:
    sides = changed_words(before, after)
    assert ["".join(text for text, _ in side) for side in sides] == [before, after]
    same = ["".join(text for text, changed in side if not changed).split() for side in sides]
    assert same[0] == same[1]
    assert all(text.strip() for side in sides for text, changed in side if changed)
