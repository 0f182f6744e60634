"""Fluency by n-gram entropy: how varied an answer is; a model that loops scores low."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from pke_fast.intervals import Interval, mean_interval

# As published (Meng et al. 2022, arXiv 2202.05262; used by DINM, arXiv 2403.14472): the mean over both of the weighted
# entropies, so that trigrams count twice as much as bigrams.
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_WORDS = re.compile(r"\w+|[^\w\s]")


def ngram_entropy(text: str) -> float:
    """The weighted mean of the entropies, in bits, of a text's 2-grams and 3-grams of words and punctuation marks.

    Published figures cut words with NLTK, which splits a few contractions otherwise. A text without n-grams has 0.
    """
    words = _WORDS.findall(text)
    weighted = 0.0
    for n, weight in _WEIGHTS.items():
        counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
        total = sum(counts.values())
        weighted -= weight * sum(count / total * math.log2(count / total) for count in counts.values())
    return weighted / len(_WEIGHTS)


def fluency(answers: Sequence[str]) -> tuple[float, Interval | None]:
    """The mean n-gram entropy of answers, at least one, and its 95 % interval, which a single answer hasn't."""
    values = [ngram_entropy(answer) for answer in answers]
    return math.fsum(values) / len(values), mean_interval(values)
