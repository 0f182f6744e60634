"""The strength: what an edit says is multiplied until unseen requests' safe answers begin likely."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

from pke_fast import detectors, shipped, strength, summary
from pke_fast.batches import pack
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.editing import Outcome, edit_columns
from pke_fast.encoding import Encoded
from pke_fast.kinds import PROJECTIONS
from pke_fast.layer_patch import LayerPatch
from pke_fast.preparation import MOST_UNSEEN, prepare
from pke_fast.requests import EditRequest
from pke_fast.resume import NOWHERE, Snapshot
from pke_fast.stages import Stages
from pke_fast.strength import LIKELY, LOUDER, WHOLE, Tried, answers_begun, beginnings, least, refusing
from pke_fast.structure import find_structure
from pke_fast.testing import NEURONS, tiny_model, tiny_tokenizer
from pke_fast.trainer import Losses
from pke_fast.workbench import workbench

PAD = 259
HOT_SPOTS = {1: torch.tensor([1, 5, 7, 30]), 2: torch.tensor([0, NEURONS - 1])}
CONFIG = PKEConfig(num_steps=4, batch_size=3, locality_batch_size=4, lr=1e-2, stop_loss=0.0, micro_batch_tokens=64)


def edited(requests, locality, unseen, **settings):
    model = tiny_model("llama").requires_grad_(False)
    config = CONFIG.replace(**settings)
    stage = Stages().stage
    where = find_structure(model)
    return model, edit_columns(where, HOT_SPOTS, requests, locality, config, pad_id=PAD, stage=stage, unseen=unseen)


def test_counts_are_those_of_whole_forwards(sequences, monkeypatch) -> None:
    monkeypatch.setattr(strength, "LIKELY", math.log(300))  # about what this model's tokens have
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    columns = columns_of(structure, HOT_SPOTS, PROJECTIONS)
    for column in columns:
        column.master += 0.4 * torch.randn(column.master.shape, generator=torch.Generator().manual_seed(column.layer))
    unseen = beginnings(sequences(12))
    (batch,) = pack(unseen, 10_000, PAD)

    def stretch(by: float) -> None:
        for column in columns:
            column.stretch(by)

    found = answers_begun(structure, batch, min(HOT_SPOTS), WHOLE, stretch)
    wanted = []
    for factor in WHOLE:
        stretch(factor)
        losses = [-model(torch.tensor([s.ids[:-1]])).logits[0, -1].log_softmax(-1)[s.ids[-1]].item() for s in unseen]
        wanted.append(sum(loss < math.log(300) for loss in losses))
    assert found.tolist() == wanted
    assert len(set(wanted)) > 1
    assert all(0 < count < len(unseen) for count in wanted)


def test_beginnings_end_with_the_answers_first_token() -> None:
    assert beginnings([Encoded((5, 6, 7, 8, 9), 3, (1,))]) == [Encoded((5, 6, 7, 8), 3)]
    assert pytest.approx(0.5) == math.exp(-LIKELY)


def test_held_prompts_get_the_refusals_first_token() -> None:
    unseen = [Encoded((1, 2, 77, 78), 2), *[Encoded((3, 88), 1)] * 3]
    held = [Encoded((10 + n, 20, 30, 40), 2, (0,)) for n in range(5)]
    assert refusing(held, unseen) == [Encoded((10 + n, 20, 77), 2) for n in (0, 3)]
    assert refusing(held[:1], unseen) == [Encoded((10, 20, 77), 2)]
    assert refusing([], unseen) == []


@pytest.mark.parametrize(
    ("shares", "wanted", "found"),
    [
        ((0.1, 0.2, 0.7, 0.7, 0.8, 0.9), 0.7, 1.2),
        ((0.9,) * 6, 0.7, 1.0),
        ((0.0,) * 6, 0.7, 1.5),
        ((0.0,) * 6, 0.0, 1.0),
    ],
)
def test_the_least_that_is_enough(shares, wanted, found) -> None:
    assert least(WHOLE, shares, wanted) == found


def test_an_edit_goes_as_far_as_unseen_requests_need(sequences) -> None:
    sides = sequences(6), sequences(9, seed=1)
    unseen = sequences(5, seed=7)
    _, plain = edited(*sides, unseen, strength=1.0)
    _, without = edited(*sides, ())
    model, most = edited(*sides, unseen, unseen_refused=1.0)
    _, least_of_all = edited(*sides, unseen, unseen_refused=0.0)
    assert (plain.strength, without.strength, most.strength, least_of_all.strength) == (1.0, 1.0, WHOLE[-1], 1.0)
    for once, bare, more, same in zip(plain.layers, without.layers, most.layers, least_of_all.layers, strict=True):
        assert torch.equal(once.new, bare.new)
        assert torch.equal(once.new, same.new)
        assert torch.allclose(more.new - more.old, WHOLE[-1] * (once.new - once.old), atol=1e-6)
    live = columns_of(find_structure(model), HOT_SPOTS, PROJECTIONS)
    assert all(torch.equal(column.exact, part.new) for column, part in zip(live, most.layers, strict=True))
    assert most.after != plain.after  # measured on what stays


TOO_LITTLE, TOO_MUCH = "2 of 10 other harmful requests", "5 of 40 harmless prompts"


@pytest.mark.parametrize(
    ("refused", "held_refused", "told"),
    [(3, 4, []), (2, 4, [TOO_LITTLE]), (3, 5, [TOO_MUCH]), (2, 5, [TOO_LITTLE, TOO_MUCH])],
)
def test_a_strength_that_refuses_too_little_or_what_is_held_is_warned_of(refused, held_refused, told) -> None:
    part = LayerPatch(0, "w", 1, torch.tensor([0]), torch.zeros(1, 2), torch.ones(1, 2))
    tried = (Tried(1.0, 0, 10, 40, 40), Tried(2.0, refused, 10, held_refused, 40))
    outcome = Outcome((part,), (), Losses(2.0, 0.0), Losses(0.1, 0.0), "", 2.0, tried)
    warnings = summary.warnings_of(outcome, 0.6)
    assert [expected in text for expected, text in zip(told, warnings, strict=True)] == [True] * len(told)


def test_all_strengths_that_were_tried_are_told(sequences, monkeypatch) -> None:
    monkeypatch.setattr(strength, "LIKELY", math.log(300))  # about what this model's tokens have
    sides = sequences(6), sequences(30, seed=1)
    unseen = sequences(15, seed=7)
    _, outcome = edited(*sides, unseen)
    assert [one.strength for one in outcome.tried] == list(WHOLE)
    assert all((one.unseen, one.held) == (15, 8) for one in outcome.tried)
    model, last = edited(*sides, (), strength=WHOLE[-1])

    def begun(sequence) -> bool:
        *prompt, token = sequence.ids
        return -model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[token].item() < math.log(300)

    counts = [sum(map(begun, side)) for side in (beginnings(unseen), refusing(sides[1], unseen))]
    assert [outcome.tried[-1].refused, outcome.tried[-1].held_refused] == counts
    assert 0 < counts[0] < 15
    assert 0 < counts[1] < 8
    assert last.tried == ()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_detectors_their_words_alone_are_louder(dtype, sequences, monkeypatch) -> None:
    """All else stays as the steps left it, to the bit; so does a run that was interrupted after them."""
    monkeypatch.setattr(detectors, "LEAST", 1)
    monkeypatch.setattr(detectors, "GAINS", (1.0,))
    sides, unseen = (sequences(6), sequences(9, seed=1)), sequences(5, seed=7)
    kept: list[dict[str, torch.Tensor]] = []

    class Kept(Snapshot):
        def load(self):
            return kept[-1] if kept else None

        def save(self, state, *, done=False):
            kept.append({name: tensor.clone() for name, tensor in state().items()})

    def found(snapshot=NOWHERE, **settings):
        model = tiny_model("llama", dtype=dtype).requires_grad_(False)
        more = {"pad_id": PAD, "stage": Stages().stage, "unseen": unseen, "snapshot": snapshot}
        return edit_columns(find_structure(model), HOT_SPOTS, *sides, CONFIG.replace(**settings), **more)

    once, most = found(strength=1.0), found(Kept(), unseen_refused=1.0)
    assert [one.strength for one in most.tried] == list(LOUDER)
    assert most.strength == LOUDER[-1]
    louder = 0
    for quiet, loud in zip(once.layers, most.layers, strict=True):
        rows = (quiet.new != loud.new).any(1)
        if quiet.projection == "down":
            assert int(rows.sum()) == 1
            torch.testing.assert_close(loud.new[rows], LOUDER[-1] * quiet.new[rows], rtol=1e-2, atol=1e-6)
            louder += 1
        else:
            assert not rows.any()
    assert louder == len(HOT_SPOTS)
    again = found(Kept(), unseen_refused=1.0)
    assert all(torch.equal(a.new, b.new) for a, b in zip(again.layers, most.layers, strict=True))


def test_a_given_strength_is_taken_and_a_bound_leaves_none(sequences) -> None:
    sides = sequences(6), sequences(9, seed=1)
    assert edited(*sides, sequences(3, seed=7), strength=1.7)[1].strength == 1.7
    assert edited(*sides, sequences(3, seed=7), unseen_refused=1.0, norm_constraint=0.01)[1].strength == 1.0


def test_progress_counts_every_unseen_request_once(sequences, monkeypatch) -> None:
    advanced: dict[str, list[int]] = {}
    full = iter([False, True] + [False] * 99)  # memory runs out at the second batch

    def counted(*args):
        if next(full):
            raise torch.cuda.OutOfMemoryError("too much")
        return answers_begun(*args)

    @contextmanager
    def stage(name, _total):
        yield advanced.setdefault(name, []).append

    monkeypatch.setattr("pke_fast.trainer.answers_begun", counted)
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    sides = sequences(6), sequences(9, seed=1)
    config = CONFIG.replace(micro_batch_tokens=128)
    edit_columns(structure, HOT_SPOTS, *sides, config, pad_id=PAD, stage=stage, unseen=sequences(60, seed=7))
    shown = advanced["Finding the strength"]
    assert sum(shown) == 60 + 9  # and the pairs that are held
    assert sum(count > 0 for count in shown) > 2  # as it goes, not at the end
    assert min(shown) == 0  # what had been shown was counted anew


def test_unseen_requests_are_shipped_ones_that_nothing_else_sees() -> None:
    config = PKEConfig(companions=8, shipped_pairs=4, locality_tokens=1)
    given = [EditRequest(shipped.harmful()[3].prompt, "No.", "Sure"), EditRequest("Rob him", "No.", "Sure")]
    with workbench(tiny_model("llama"), tiny_tokenizer(), config) as bench:
        job = prepare(bench, given, None)
        alone = prepare(bench, given, [*prepare(bench, given, None).locality])
    unseen = {request.prompt for request in job.unseen}
    assert 0 < len(unseen) <= MOST_UNSEEN
    assert unseen <= {request.prompt for request in shipped.harmful()}
    assert not unseen & {request.prompt for request in job.edited_on}
    assert all(request.target_new == config.refusal for request in job.unseen)
    assert alone.unseen == ()
