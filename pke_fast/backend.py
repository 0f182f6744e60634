"""The engine for other front ends: trace, select, update. Tokens go in, a patch comes out; no tokenizer is asked.

A front end that renders prompts in its own way hands over token ids. What stays from version to version is in
docs/backend.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from operator import index as whole
from typing import Any

import torch
from torch import Tensor

from pke_fast import editing, hotspots, scoring, summary
from pke_fast.choice import using
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.fingerprint import fingerprint
from pke_fast.hotspots import HotSpots
from pke_fast.inputs import check_items, check_model, shown
from pke_fast.pace import Pace
from pke_fast.patch import Patch
from pke_fast.scoring import Scores
from pke_fast.structure import Structure, find_structure
from pke_fast.workbench import laid_out, name_of

Sequences = Sequence[Encoded | tuple[Sequence[int], Sequence[int]]]
"""Prompts with their answers: `Encoded`, or pairs of token ids (prompt, answer)."""

_PAD = 0  # any token: padding is masked


def _nothing(_n: int) -> None:
    """Progress that nobody wants to know."""


def trace(
    model: Any,
    batches: Sequences,
    *,
    first: int = 0,
    micro_batch_tokens: int = 2048,
    backend: str = "auto",
    advance: Callable[[int], None] = _nothing,
) -> Scores:
    """Scores every MLP neuron by the gradient of each answer's mean negative log-likelihood.

    Args:
        model: a decoder-only causal language model of transformers, in fp32, bf16 or fp16; left as it is.
        batches: one sequence a request. They are packed by length here, so their order and number don't matter.
        first: layers below are not scored; their rows are 0.
        micro_batch_tokens: most tokens (padding counted) in flight at once; the scores don't depend on it.
        backend: what the ops run in, as the setting of that name.
        advance: called with the number of sequences that were scored.

    Returns:
        weight changes and activation paths, fp32 [L, D] on the CPU, means over the sequences. Scores of two sets of
        sequences add up to those of both.

    Raises:
        InputError: the model or a sequence can't be used, or a score isn't finite.
    """
    with _opened(model, backend) as structure:
        sequences = _encoded(structure, batches, "batches")
        if not 0 <= first < len(structure.layers):
            expected = f"a layer, 0 to {len(structure.layers) - 1}"
            raise InputError("first is no layer of the model", expected=expected, got=str(first))
        return scoring.score(
            structure,
            [[(sequence, 1.0)] for sequence in sequences],
            pad_id=_PAD,
            pace=Pace(micro_batch_tokens),
            first=first,
            advance=advance,
        )


def select(
    scores: Scores | Tensor, locality: Scores | None = None, *, k: int = PKEConfig.k, **settings: Any
) -> HotSpots:
    """The k highest neurons: of what `trace` found on harmful prompts, less the same on benign ones where given.

    Args:
        scores: of `trace`, or any score map, fp32 [L, D].
        locality: of `trace` on benign prompts; not with a score map.
        k: how many neurons.
        settings: `window`, `per_layer_cap`, `exclude`, `score`, `seed` of `PKEConfig`; the window is the upper third
            of the layers by default.

    Returns:
        at most k neurons by layer; equal scores go to the lowest index.

    Raises:
        InputError: a setting can't be used, or there are fewer than k neurons to choose from.
    """
    if not isinstance(scores, Scores | Tensor):
        raise InputError("the scores can't be used", expected="Scores, or a map fp32 [L, D]", got=shown(scores))
    if locality is not None and not (isinstance(locality, Scores) and isinstance(scores, Scores)):
        raise InputError(
            "scores of benign prompts can't be used",
            expected="Scores of trace, beside such of harmful prompts",
            got=f"{type(locality).__name__} beside {type(scores).__name__}",
            do="of score maps of your own, give the one to choose by",
        )
    kind = "toxic" if locality is None else "contrast"
    config = PKEConfig().replace(k=k, **{"score": kind, **settings})
    if config.score == "contrast" and locality is None:
        raise InputError("score: contrast needs scores of benign prompts", do="give locality, or score='toxic'")
    return hotspots.select(scores if isinstance(scores, Tensor) else hotspots.rank(scores, locality, config), config)


def update(
    model: Any,
    hot_spots: HotSpots | Mapping[int, Sequence[int] | Tensor],
    batches: Sequences,
    locality: Sequences | None = (),
    *,
    advance: Callable[[int], None] = _nothing,
    **settings: Any,
) -> Patch:
    """Edits the hot spots' weights in place until the answers of `batches` are likely.

    Args:
        model: as for `trace`; edited.
        hot_spots: of `select`, or neurons by layer.
        batches: harmful prompts with the answers wanted.
        locality: benign prompts with answers that must not move; None for none.
        advance: called with 1 after every step.
        settings: of `PKEConfig`, as `num_steps`, `lr`, `w_kl`, `norm_constraint`, `seed`, `backend`; those that tell
            how prompts are rendered, scored or joined have no effect.

    Returns:
        the change, old values and new ones: `Patch.revert(model)` takes it back to the bit.

    Raises:
        InputError: the model, a sequence, a neuron or a setting can't be used; the model is unchanged.
        EditError: a loss became NaN; the weights were put back.
    """
    config = PKEConfig().replace(**settings)
    with _opened(model, config.backend) as structure:
        neurons = _neurons(structure, hot_spots)
        requests = _encoded(structure, batches, "batches")
        benign = _encoded(structure, () if locality is None else locality, "locality", least=0)
        facts = summary.facts_of(structure, name_of(model), fingerprint(model))

        @contextmanager
        def stage(name: str, _total: int) -> Any:
            yield advance if name == editing.STEPS else _nothing

        outcome = editing.edit_columns(structure, neurons, requests, benign, config, pad_id=_PAD, stage=stage)
    meta = summary.patch_meta(facts, config.as_dict(), len(requests), len(benign), outcome)
    return Patch(outcome.layers, meta)


@contextmanager
def _opened(model: Any, backend: str) -> Any:
    """The structure of a model that is laid out for work."""
    check_model(model)
    with using(backend), laid_out(model):
        yield find_structure(model)


def _encoded(structure: Structure, batches: Sequences, name: str, least: int = 1) -> list[Encoded]:
    """The sequences, checked against the model's vocabulary and context."""
    from pke_fast.loading import context_length

    vocabulary = structure.model.get_input_embeddings().weight.shape[0]
    limit = context_length(structure.model)
    check_items(name, batches, object, "(prompt ids, answer ids)")
    if len(batches) < least:
        raise InputError(f"{name} is empty", expected="at least one sequence: (prompt ids, answer ids)", got="none")
    sequences = []
    for index, item in enumerate(batches):
        where = f"sequence {index} of {name} can't be used"
        if not isinstance(item, Encoded):
            try:
                prompt, answer = ([whole(token) for token in part] for part in item)
            except (TypeError, ValueError) as error:
                raise InputError(where, expected="(prompt ids, answer ids)", got=f"{item!r:.80}") from error
            item = Encoded((*prompt, *answer), len(prompt))
        if not 0 < item.prompt_length < len(item.ids):
            got = f"{item.prompt_length} and {item.answer_length}"
            raise InputError(where, expected="at least one token of prompt and one of answer", got=got)
        if limit is not None and len(item.ids) > limit:
            raise InputError(where, expected=f"at most {limit} tokens, the model's context", got=str(len(item.ids)))
        if min(item.ids) < 0 or max(item.ids) >= vocabulary:
            expected = f"token ids of 0 to {vocabulary - 1}"
            raise InputError(where, expected=expected, got=f"{min(item.ids)} to {max(item.ids)}")
        sequences.append(item)
    return sequences


def _neurons(structure: Structure, hot_spots: HotSpots | Mapping[int, Sequence[int] | Tensor]) -> dict[int, Tensor]:
    """The neurons of every layer that has any, each once, ascending."""
    by_layer = hot_spots.by_layer() if isinstance(hot_spots, HotSpots) else hot_spots
    if not isinstance(by_layer, Mapping):
        raise InputError("the hot spots can't be used", expected="HotSpots, or {layer: neurons}", got=shown(hot_spots))
    depth, width = len(structure.layers), structure.neurons
    chosen = {}
    for layer, ids in by_layer.items():
        neurons = torch.unique(torch.as_tensor(ids, dtype=torch.int64, device="cpu"))
        if not 0 <= layer < depth or (len(neurons) and not 0 <= int(neurons[0]) <= int(neurons[-1]) < width):
            raise InputError(
                f"a hot spot of layer {layer} isn't in the model",
                expected=f"layers 0 to {depth - 1}, neurons 0 to {width - 1}",
                got=f"layer {layer}, neurons {neurons.tolist()[:8]}",
            )
        if len(neurons):
            chosen[layer] = neurons
    if not chosen:
        raise InputError("no hot spots", expected="at least one neuron", got="none", do="select some first")
    return chosen
