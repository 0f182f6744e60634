"""What all sequences begin with runs once: the rest goes on from it as if it had run whole, or it isn't done."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers

from pke_fast import generation, scoring
from pke_fast.batches import make_batch, packing
from pke_fast.beginning import beginning_of
from pke_fast.config import PKEConfig
from pke_fast.editing import edit_columns
from pke_fast.encoding import Encoded, PromptEncoder
from pke_fast.generation import generate
from pke_fast.pace import Pace
from pke_fast.prefix import LEAST, Prefix, common
from pke_fast.structure import find_structure
from pke_fast.tape import record
from pke_fast.testing import CONTEXT, FAMILIES, tiny_model, tiny_tokenizer

PAD = 259
START = tuple(range(40, 52))
OWN_CACHE = ["gpt2"] if transformers.__version__.startswith("4.") else []


@pytest.fixture
def alike(sequences):
    """Sequences that begin alike, of several lengths."""

    def make(n: int, seed: int = 0) -> list[Encoded]:
        found = sequences(n, seed)
        return [Encoded((*START, *s.ids), len(START) + s.prompt_length) for s in found]

    return make


def test_what_is_common():
    assert common([(*START, 1, 2), (*START, 1), (*START, 3)]) == START
    assert common([(*START, 1), START]) == START[:-1]  # something is left of each
    assert common([(*START[: LEAST - 1], 1), (*START[: LEAST - 1], 2)]) == ()
    assert common([(*START, 1)]) == ()
    assert common([]) == ()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_goes_on_as_if_it_had_run_whole(family, dtype, alike, tapped):
    structure = find_structure(tiny_model(family, dtype=dtype).requires_grad_(False))
    examples = alike(9)
    beginning = beginning_of(structure, examples, 1, PAD)
    if beginning is None and family in OWN_CACHE:
        pytest.skip("this version of transformers has a cache of its own kind for this model: it runs whole")
    assert beginning is not None
    lead = beginning.batch.input_ids.shape[1]
    assert lead == len(START)
    packed = packing(examples, 100)
    assert len(packed) > 1
    seen: list[torch.Tensor] = []
    with tapped(structure, 1, seen):
        for rows in packed * 2:  # what is kept isn't used up
            whole = record(structure, make_batch(examples, rows, PAD), 1)
            rest = make_batch([sequence.after(lead) for sequence in examples], rows, PAD)
            ours = record(structure, rest, 1, after=beginning)
            assert ours.entered.shape == (*rest.input_ids.shape, structure.hidden_size)
            with torch.no_grad():
                tops = [tape.supervised(tape.run()).float() for tape in (whole, ours)]
            assert (tops[1] - tops[0]).norm() < (1e-5 if dtype == "fp32" else 2e-2) * tops[0].norm()
            for kept in (None, 0):
                seen.clear()
                way = torch.randn(tops[0].shape, generator=torch.Generator().manual_seed(0))
                for tape in (whole, ours):
                    tape.there_and_back(lambda hidden: (hidden.float() * way).sum(), kept)  # noqa: B023
                of_rest, of_lead = seen[1], seen[2]  # of the rows, and then of what they go on from
                truth = seen[0] * whole.batch.attention_mask[..., None]
                of_rest = of_rest * rest.attention_mask[..., None]
                close = 1e-4 if dtype == "fp32" else 5e-2
                assert (of_rest - truth[:, lead:]).norm() < close * truth.norm()
                assert (of_lead - truth[:, :lead].sum(0)).norm() < close * truth.norm()
                assert of_lead.norm() > 0


def test_keys_and_values_of_the_layers_below_are_let_go(alike, monkeypatch):
    """Each is needed while its layer runs, and a tape keeps what enters its lowest layer alone."""
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    examples = alike(4)
    beginning = beginning_of(structure, examples, 2, PAD)
    made, once, alive = [], Prefix.once, []

    def watched(self):
        cache = once(self)
        made.append(weakref.ref(cache))
        update = cache.update

        def updated(*args, **kwargs):
            keys, values = update(*args, **kwargs)
            alive.append(weakref.ref(keys))
            assert sum(ref() is not None for ref in alive) == 1
            return keys, values

        cache.update = updated
        return cache

    monkeypatch.setattr(Prefix, "once", watched)
    tape = record(structure, make_batch([s.after(len(START)) for s in examples], range(4), PAD), 2, after=beginning)
    gc.collect()  # the test's own circle
    assert len(alive) == 2
    assert [ref() for ref in made] == [None]
    assert tape.run().isfinite().all()


def test_nothing_is_kept_where_it_would_not_pay(sequences, alike, monkeypatch):
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    assert beginning_of(structure, sequences(5), 2, PAD) is None  # they don't begin alike
    assert beginning_of(structure, alike(5), 0, PAD) is None  # there are no layers below
    assert beginning_of(structure, alike(1), 2, PAD) is None
    assert beginning_of(structure, alike(5), 2, PAD) is not None
    structure.layers[2]._hf_hook = SimpleNamespace(offload=True)  # its weights would come twice as often
    assert beginning_of(structure, alike(5), 2, PAD) is None


def spoil(monkeypatch, how, model, ids):
    """Makes going on fail, or attend to another beginning than there was."""
    other = Prefix.of(model, ids[::-1], torch.device("cpu"))

    def spoilt(own):
        def made(_self, *args):
            if how == "raises":
                raise TypeError("no such cache")
            return own(other, *args)

        return made

    for name in ("rows", "once"):
        monkeypatch.setattr(Prefix, name, spoilt(getattr(Prefix, name)))


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_a_model_that_does_not_go_on_alike_runs_whole(how, alike, monkeypatch, caplog):
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    spoil(monkeypatch, how, structure.base, START)
    with caplog.at_level(logging.INFO, logger="pke_fast"):
        assert beginning_of(structure, alike(5), 2, PAD) is None
    assert "every sequence runs whole" in caplog.text


@pytest.mark.parametrize("detectors", [False, True])
def test_an_edit_is_the_same(detectors, alike, monkeypatch):
    config = PKEConfig(num_steps=4, batch_size=2, locality_batch_size=3, detectors=detectors)
    monkeypatch.setattr("pke_fast.detectors.LEAST", 1)
    spots = {1: torch.arange(3), 2: torch.arange(4)}

    def edited():
        structure = find_structure(tiny_model("llama").requires_grad_(False))
        outcome = edit_columns(
            structure, spots, alike(4), alike(6, seed=1), config, pad_id=PAD, stage=lambda *_: _Stage()
        )
        return outcome, torch.cat([(part.new - part.old).flatten() for part in outcome.layers])

    used = []
    monkeypatch.setattr("pke_fast.editing.beginning_of", lambda *given: used.append(beginning_of(*given)) or used[-1])
    ours, change = edited()
    assert [tape.prefix is not None for tape in used] == [True]
    monkeypatch.setattr("pke_fast.editing.beginning_of", lambda *_: None)
    whole, truth = edited()
    assert len(ours.steps) == len(whole.steps) == 4
    for a, b in zip(ours.steps, whole.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert (change - truth).norm() < 1e-2 * truth.norm()


class _Stage:
    def __enter__(self):
        return lambda _n: None

    def __exit__(self, *_):
        return None


PROMPTS = [f"{'abc ' * (i % 5)}number {i}" for i in range(20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same(family, monkeypatch):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, PKEConfig(system_prompt="You are of much help."), CONTEXT)
    used = []
    whole = Prefix.rows
    monkeypatch.setattr(Prefix, "rows", lambda self, count: used.append(count) or whole(self, count))
    ours = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=6, batch_size=7)
    if not used and family in OWN_CACHE:
        pytest.skip("this version of transformers has a cache of its own kind for this model: it runs whole")
    assert used == [2, 7, 7, 6]  # two by which it is checked, then every batch
    known = dict(enumerate(ours))
    assert generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=6, known=known) == ours
    monkeypatch.setattr(generation, "MANY", 100)
    assert generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=6, batch_size=7) == ours
    assert used == [2, 7, 7, 6]
    assert len(set(ours)) > 5


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_a_model_that_answers_otherwise_runs_whole(how, monkeypatch, caplog):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, PKEConfig(system_prompt="You are of much help."), CONTEXT)
    monkeypatch.setattr(generation, "MANY", 100)
    truth = generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=4)
    monkeypatch.setattr(generation, "MANY", 16)
    spoil(monkeypatch, how, model, common([encoder.prompt_ids(prompt) for prompt in PROMPTS]))
    own = model.generation_config
    with caplog.at_level(logging.INFO, logger="pke_fast"):
        assert generate(model, tokenizer, encoder, PROMPTS, max_new_tokens=4) == truth
    assert "every prompt runs whole" in caplog.text
    assert model.generation_config is own


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_same_and_the_layers_below_run_on_the_rest(family, alike, monkeypatch):
    structure = find_structure(tiny_model(family).requires_grad_(False))
    examples = [[(sequence, 1.0)] for sequence in alike(40)]
    tokens = []
    structure.mlps[0].module.register_forward_hook(lambda _m, _args, out: tokens.append(out.shape[:-1].numel()))

    def scored(least: int):
        monkeypatch.setattr(scoring, "LEAST_SEQUENCES", least)
        tokens.clear()
        found = scoring.score(structure, examples, pad_id=PAD, pace=Pace(64), first=1)
        return found, sum(tokens)

    (whole, most), (shared, few), (again, _) = scored(41), scored(40), scored(40)
    if family not in OWN_CACHE:
        assert few < most
    for name in ("weight_change", "activation_path", "activation"):
        ours, wanted = getattr(shared, name), getattr(whole, name)
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-4
        assert torch.equal(ours, getattr(again, name))
        assert not ours[0].any()
