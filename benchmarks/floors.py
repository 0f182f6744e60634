"""What is possible at all: the multiplications that each way needs, what it keeps, and the ratios that follow.

    python benchmarks/floors.py

Counted: the layers' projections, the head, and what scores or trains. Attention over short sequences, norms and
activations are left out of both sides; so is memory traffic, which on a CPU costs whoever makes whole logits more.
What is kept for the way back is counted by token and layer; logits and dense gradients come on top of hooks'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model and what runs through it.

    Attributes:
        layer: parameters of a layer's projections.
        heads, keys: attention heads, and the width of a layer's keys.
        tokens, supervised: tokens of all sequences, and positions that predict an answer's token.
        length: tokens of a sequence.
    """

    layers: int
    layer: int
    heads: int
    keys: int
    hidden: int
    neurons: int
    vocabulary: int
    tokens: int
    supervised: int
    length: int

    def through(self, layers: float) -> float:
        """Operations of one pass of all tokens through so many layers, forward or backward."""
        return 2.0 * self.tokens * self.layer * layers

    def logits(self, positions: int) -> float:
        """Operations of the head and its gradient with respect to the hidden states at so many positions."""
        return 2 * 2.0 * positions * self.hidden * self.vocabulary

    @property
    def columns(self) -> float:
        """Operations of one layer's dense weight gradient of the down projection."""
        return 2.0 * self.tokens * self.hidden * self.neurons

    @property
    def norms(self) -> float:
        """Operations of one layer's gradient norms, by the cheaper of both forms."""
        return min(self.columns, 2.0 * self.tokens * self.length * (self.hidden + self.neurons))


# SmolLM2-135M: 9 heads, 3 of keys and values; the 16 shipped requests that the benchmarks trace.
SMOLLM2 = Shape(
    layers=30,
    layer=2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536,
    heads=9,
    keys=192,
    hidden=576,
    neurons=1536,
    vocabulary=49152,
    tokens=971,
    supervised=208,
    length=61,
)


def tracing(shape: Shape) -> dict[str, float]:
    """Operations of tracing all layers, by way."""
    both = 2 * shape.through(shape.layers)
    few, norms = shape.logits(shape.supervised), shape.layers * shape.norms
    dense = shape.layers * shape.columns
    return {
        "pke_fast, every layer run again": both + shape.through(shape.layers) + few + norms,
        "pke_fast, nothing run again": both + few + norms,
        "hooks": both + shape.logits(shape.tokens) + dense,
        "hooks, few logits": both + few + dense,
    }


def kept(shape: Shape) -> dict[str, int]:
    """Numbers that are kept of a token in a layer for the way back, by way: the inputs of both norms and their
    scales; queries, keys, values, what attention returns, and its normaliser; and what each way needs of the MLP."""
    attention = 2 * (shape.hidden + 1) + 2 * shape.hidden + 2 * shape.keys + shape.heads
    return {
        "pke_fast, the layer run again": shape.hidden,
        "pke_fast, if gate and up alone were run again": attention,
        "pke_fast, nothing run again": attention + 2 * shape.neurons,
        "hooks": attention + 5 * shape.neurons,  # the activation's value, h and its gradient too
        "dense masked Adam": attention + 4 * shape.neurons,  # no gradient of h
    }


def step(shape: Shape, first: int) -> tuple[float, float]:
    """Operations of a step with hot spots from layer `first` on: the window's forward and backward with few logits;
    and the whole forward, the window's backward, its dense weight gradients and whole logits."""
    window = shape.layers - first
    ours = 2 * shape.through(window) + shape.logits(shape.supervised)
    dense = shape.through(shape.layers) + shape.through(window) + window * shape.columns + shape.logits(shape.tokens)
    return ours, dense


def step_in(shape: Shape, first: int, share: float) -> float:
    """Operations of a step that keeps at most this share of dense masked Adam's graph: of the layers, as many run again
    as that takes."""
    numbers = kept(shape)
    whole, none = numbers["pke_fast, nothing run again"], numbers["pke_fast, the layer run again"]
    again = min(max((whole - share * numbers["dense masked Adam"]) / (whole - none), 0), 1)
    return step(shape, first)[0] + again * shape.through(shape.layers - first)


def main() -> int:
    found = tracing(SMOLLM2)
    print("SmolLM2-135M, the shipped requests\n\n| tracing | GFLOP | of hooks' | of tuned hooks' |\n|---|---|---|---|")
    for name, flops in found.items():
        ratios = (flops / found[other] for other in ("hooks", "hooks, few logits"))
        print(f"| {name} | {flops / 1e9:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    numbers = kept(SMOLLM2)
    print("\n| kept for the way back | numbers a token and layer | of hooks' |\n|---|---|---|")
    for name, count in numbers.items():
        print(f"| {name} | {count:,} | {count / numbers['hooks']:.2f} |")
    print("\n| an edit step from layer | pke_fast | dense masked Adam | ratio | in a quarter of its graph's memory |")
    print("|---|---|---|---|---|")
    for first in (15, 22, 27):
        ours, dense = step(SMOLLM2, first)
        quarter = step_in(SMOLLM2, first, 0.25)
        print(f"| {first} | {ours / 1e9:.0f} | {dense / 1e9:.0f} | {ours / dense:.2f} | {quarter / dense:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
