"""What the model itself knows: a linear probe that tells harmful prompts from harmless ones by its hidden states.

The probe is the yardstick of precision. It reads the residual stream at the last token of a prompt, where the answer
begins; an edit that refuses as many harmful prompts at as few false alarms uses all that the model knows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import make_batch, packing
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.module_calls import first_tensor, hooks
from pke_fast.pace import in_flight, told_once
from pke_fast.roc import Roc, roc
from pke_fast.structure import Structure
from pke_fast.tape import passed_over
from pke_fast.workbench import Workbench

INVERSE_PENALTY = 0.01  # sklearn's C, on standardised states; the best of 1e-4 to 1 on SmolLM2-135M
TOKENS = 4096  # of a batch, padding counted
FOLDS = 5
CANDIDATES = 6  # layers that are tried by default
MOST_ROUNDS = 500  # of LBFGS


@dataclass(frozen=True, eq=False)
class Linear:
    """A logistic regression on standardised features.

    Attributes:
        mean, scale: fp64 [d]: features are taken less the mean and over the scale.
        weights: fp64 [d], of the standardised features.
        bias: added to the score; harmful is what scores above 0.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: float

    def scores(self, features: Tensor) -> Tensor:
        """fp64 [n], the log odds of being harmful, of features [n, d]."""
        return ((features.double() - self.mean) / self.scale) @ self.weights + self.bias


def fit_linear(harmful: Tensor, harmless: Tensor, inverse_penalty: float = INVERSE_PENALTY) -> Linear:
    """Class-balanced logistic regression with an L2 penalty: the minimum of C * sum_i v_i loss_i + |w|^2 / 2.

    v_i is n / (2 n_class), and the bias isn't penalised, as in scikit-learn's LogisticRegression with
    class_weight="balanced" after its StandardScaler. A feature that is the same everywhere is left out.

    Args:
        harmful, harmless: [n, d] and [m, d], both of at least one row.
        inverse_penalty: C.

    Raises:
        InputError: one side is empty, a feature isn't finite, or C isn't positive.
    """
    if not len(harmful) or not len(harmless) or not 0 < inverse_penalty < math.inf:
        raise InputError(
            "no probe can be fitted",
            expected="harmful and harmless prompts, and a penalty above 0",
            got=f"{len(harmful)} and {len(harmless)}, C = {inverse_penalty}",
        )
    x = torch.cat([harmful, harmless]).double()
    if not bool(torch.isfinite(x).all()):
        raise InputError("no probe can be fitted: the model's hidden states aren't finite", do="use fp32 or bf16")
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * mean.abs().clamp(min=1.0), scale, math.inf)
    x = (x - mean) / scale
    sign = torch.cat([torch.ones(len(harmful)), -torch.ones(len(harmless))]).double().to(x.device)
    weight = torch.where(sign > 0, len(x) / (2 * len(harmful)), len(x) / (2 * len(harmless)))
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=MOST_ROUNDS,
        max_eval=4 * MOST_ROUNDS,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        w, b = parameters[:-1], parameters[-1]
        losses = torch.nn.functional.softplus(-sign * (x @ w + b))
        loss = inverse_penalty * (weight * losses).sum() + w @ w / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    found = parameters.detach()
    return Linear(mean, scale, found[:-1].clone(), float(found[-1]))


@torch.no_grad()
def last_states(
    structure: Structure,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    pad_id: int,
    tokens: int = TOKENS,
    advance: Callable[[int], None] = lambda _n: None,
) -> dict[int, Tensor]:
    """What each of some decoder layers returns at the last token of every prompt.

    The model's own forward runs once, batched by length; the layers above the highest one wanted are passed over.

    Args:
        prompts: token ids, at least one each.
        layers: numbers of decoder layers.
        tokens: most tokens in a batch, padding counted.
        advance: called with the number of prompts of a finished batch.

    Returns:
        by layer, fp32 [n, d] on the CPU, in the order of the prompts.
    """
    depth = len(structure.layers)
    found = {layer: torch.empty(len(prompts), structure.hidden_size) for layer in layers}
    encoded = [Encoded(tuple(ids), len(ids)) for ids in prompts]
    rows: tuple[int, ...] = ()
    ends = torch.empty(0, dtype=torch.int64)

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = first_tensor(output)
            found[layer][list(rows)] = hidden[torch.arange(len(rows)), ends.to(hidden.device)].float().cpu()

        return hook

    taps = (structure.layers[layer].register_forward_hook(keep(layer)) for layer in layers)
    with hooks(*taps), passed_over(structure, range(max(layers) + 1, depth)):
        for chosen in packing(encoded, tokens):
            batch = make_batch(encoded, chosen, pad_id).to(structure.device)
            rows, ends = batch.rows, batch.attention_mask.sum(1) - 1
            with in_flight(batch):
                structure.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            advance(len(chosen))
    return found


def states_of(
    bench: Workbench, prompts: Sequence[str], layers: Sequence[int], advance: Callable[[int], None] = lambda _n: None
) -> dict[int, Tensor]:
    """`last_states` of prompts as they are asked, at the bench's pace."""
    ids = [bench.encoder.prompt_ids(prompt) for prompt in prompts]
    begin = told_once(advance)

    def states() -> dict[int, Tensor]:
        tokens = bench.pace.tokens
        return last_states(bench.structure, ids, layers, pad_id=bench.pad_id, tokens=tokens, advance=begin())

    return bench.pace.slower_if_it_must(states, "asking what the model knows")


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe that was fitted.

    Attributes:
        layer: the decoder layer whose output it reads.
        linear: its weights; a prompt that scores above 0 is called harmful, harmful and harmless counting alike.
        cross_validated: of the training prompts, each scored by a probe that didn't see its group.
        auc_by_layer: the cross-validated area of every layer that was tried.
    """

    layer: int
    linear: Linear
    cross_validated: Roc
    auc_by_layer: dict[int, float]

    def scores(self, bench: Workbench, prompts: Sequence[str]) -> Tensor:
        """fp64 [n], the log odds of each prompt's being harmful."""
        return self.linear.scores(states_of(bench, prompts, [self.layer])[self.layer])


def candidates(depth: int) -> list[int]:
    """The layers tried by default: evenly from the middle of the model to its last."""
    first = depth // 2
    count = min(CANDIDATES, depth - first)
    return sorted({round(first + i * (depth - 1 - first) / max(1, count - 1)) for i in range(count)})


def fit(
    harmful: dict[int, Tensor],
    harmless: dict[int, Tensor],
    groups: tuple[Sequence[str | None], Sequence[str | None]] | None = None,
    *,
    inverse_penalty: float = INVERSE_PENALTY,
    seed: int = 0,
) -> Probe:
    """The probe of the layer that tells best, by cross-validation.

    Args:
        harmful, harmless: `last_states` by layer; at least two prompts of each.
        groups: kinds of the harmful and of the harmless prompts, held out in turn: a probe is then judged by kinds that
            it hasn't seen. Prompts of no kind, and all where there are no kinds, are dealt to folds at random.
        seed: of the folds.

    Raises:
        InputError: fewer than two prompts on one side.
    """
    counts = [len(next(iter(side.values()))) for side in (harmful, harmless)]
    if min(counts) < 2:
        raise InputError(
            "too few prompts for a probe", expected="at least two harmful and two harmless ones",
            got=f"{counts[0]} and {counts[1]}",
        )  # fmt: skip
    folds = [
        folds_of(side, FOLDS, seed + number)
        for number, side in enumerate(groups or ([None] * counts[0], [None] * counts[1]))
    ]
    curves = {layer: _cross_validated(harmful[layer], harmless[layer], folds, inverse_penalty) for layer in harmful}
    layer = max(curves, key=lambda number: (curves[number].auc, number))
    linear = fit_linear(harmful[layer], harmless[layer], inverse_penalty)
    return Probe(layer, linear, curves[layer], {number: curve.auc for number, curve in curves.items()})


def folds_of(groups: Sequence[str | None], count: int, seed: int) -> list[int]:
    """The fold of each prompt, from 0 to `count` - 1.

    A kind is in one fold as a whole, the one with the fewest so far, the largest kind first; then what has no kind is
    dealt out at random. Where all are of one kind it can't be held out: it counts as none.
    """
    if len(set(groups)) == 1:
        groups = [None] * len(groups)
    sizes, found = [0] * count, [0] * len(groups)
    kinds = {kind: [i for i, g in enumerate(groups) if g == kind] for kind in groups if kind is not None}
    for _, members in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        fold = sizes.index(min(sizes))
        sizes[fold] += len(members)
        for index in members:
            found[index] = fold
    free = [index for index, group in enumerate(groups) if group is None]
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
    for place in order:
        fold = sizes.index(min(sizes))
        sizes[fold] += 1
        found[free[place]] = fold
    return found


def _cross_validated(harmful: Tensor, harmless: Tensor, folds: Sequence[Sequence[int]], inverse_penalty: float) -> Roc:
    """The curve of scores that each prompt got from a probe of the other folds."""
    sides = harmful, harmless
    scored = [torch.zeros(len(side), dtype=torch.float64) for side in sides]
    places = [torch.tensor(list(fold)) for fold in folds]
    for fold in range(FOLDS):
        inside = [place == fold for place in places]
        if not any(bool(mask.any()) for mask in inside):
            continue  # fewer prompts or kinds than folds
        rest = [side[~mask] for side, mask in zip(sides, inside, strict=True)]
        linear = fit_linear(rest[0], rest[1], inverse_penalty)
        for scores, side, mask in zip(scored, sides, inside, strict=True):
            scores[mask] = linear.scores(side[mask])
    return roc(*scored)
