"""trace, select and update: the engine's own results from token ids alone, and nothing changed by bad input."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import pke_fast
from pke_fast.config import PKEConfig
from pke_fast.editing import edit_columns
from pke_fast.encoding import Encoded
from pke_fast.hotspots import rank
from pke_fast.pace import Pace
from pke_fast.scoring import score
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.testing import LAYERS, NEURONS, tiny_model, tiny_tokenizer

SETTINGS = {"num_steps": 4, "lr": 1e-2, "batch_size": 3, "w_kl": 1.0}


def pairs(sequences):
    return [(list(s.ids[: s.prompt_length]), list(s.ids[s.prompt_length :])) for s in sequences]


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_trace_gives_the_engines_scores_and_leaves_the_model_as_it_is(sequences):
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    wanted_grad = [parameter.requires_grad for parameter in model.parameters()]
    before = weights(model)
    ours = pke_fast.trace(model, pairs(sequences(6)), first=1)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted_grad
    assert unchanged(model, before)
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    examples = [[(sequence, 1.0)] for sequence in sequences(6)]
    theirs = score(structure, examples, pad_id=259, pace=Pace(2048), first=1)
    assert torch.equal(ours.weight_change, theirs.weight_change)
    assert torch.equal(ours.activation_path, theirs.activation_path)
    assert ours.requests == 6
    assert not ours.weight_change[0].any()


def test_encoded_sequences_and_pairs_of_ids_are_the_same(sequences):
    model = tiny_model("llama")
    a, b = pke_fast.trace(model, sequences(3)), pke_fast.trace(model, pairs(sequences(3)))
    assert torch.equal(a.weight_change, b.weight_change)


def test_select_takes_the_highest(sequences):
    model = tiny_model("llama")
    unsafe, benign = pke_fast.trace(model, sequences(4)), pke_fast.trace(model, sequences(4, seed=1))
    for locality, kind in ((None, "toxic"), (benign, "contrast")):
        spots = pke_fast.select(unsafe, locality, k=7, window=(1, 3))
        score_map = rank(unsafe, locality, PKEConfig(score=kind, window=(1, 3)))[1:3].flatten()
        chosen = [(layer - 1) * NEURONS + int(n) for layer, ids in spots.by_layer().items() for n in ids]
        assert sorted(chosen) == sorted(score_map.topk(7).indices.tolist())
    highest = torch.zeros(LAYERS, NEURONS)
    highest[2, 5] = 1.0
    assert pke_fast.select(highest, k=1).by_layer()[2].tolist() == [5]


def test_update_is_the_engines_edit_and_its_patch_reverts_to_the_bit(sequences):
    model = tiny_model("llama")
    before = weights(model)
    spots = {1: [30, 1, 5, 1], 2: torch.tensor([0])}
    steps = []
    patch = pke_fast.update(
        model, spots, pairs(sequences(5)), pairs(sequences(4, seed=1)), advance=steps.append, **SETTINGS
    )
    other = tiny_model("llama").requires_grad_(False)
    outcome = edit_columns(
        find_structure(other),
        {1: torch.tensor([1, 5, 30]), 2: torch.tensor([0])},
        sequences(5),
        sequences(4, seed=1),
        PKEConfig(**SETTINGS),
        pad_id=0,
        stage=Stages().stage,
    )
    assert steps == [1] * 4
    assert all(torch.equal(a.new, b.new) for a, b in zip(patch.layers, outcome.layers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert patch.meta["requests"] == 5
    assert patch.meta["base"]["layers"] == LAYERS
    patch.revert(model)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": [([1, 2], [])]}, "sequence 0 of batches can't be used"),
        ({"batches": [([], [1])]}, "at least one token of prompt"),
        ({"batches": [([1], [2]), [1, 2, 3]]}, "sequence 1 of batches can't be used"),
        ({"batches": None}, "batches can't be used"),
        ({"batches": "text"}, "batches can't be used"),
        ({"batches": [("text", "text")]}, "sequence 0 of batches can't be used"),
        ({"batches": [("12", "3")]}, "sequence 0 of batches can't be used"),
        ({"batches": [([1], [2.5])]}, "sequence 0 of batches can't be used"),
        ({"batches": [([1], [2], [3])]}, "sequence 0 of batches can't be used"),
        ({"batches": [([1], ["b"])]}, "expected: (prompt ids, answer ids)".replace(")", r"\)")),
        ({"batches": [([1], [260])]}, "token ids of 0 to 259"),
        ({"batches": [([1] * 512, [1])]}, "at most 512 tokens"),
        ({"locality": [([1], [2]), Encoded((1, 2), 2)]}, "sequence 1 of locality"),
        ({"hot_spots": {}}, "no hot spots"),
        ({"hot_spots": [1]}, "the hot spots can't be used"),
        ({"hot_spots": {3: [1]}}, "a hot spot of layer 3 isn't in the model"),
        ({"hot_spots": {0: [-1, 2]}}, "layers 0 to 2, neurons 0 to 47"),
        ({"num_stepz": 3}, "did you mean 'num_steps'"),
        ({"lr": -1}, "setting lr can't be -1"),
    ],
)
def test_bad_input_says_what_is_wrong_and_changes_nothing(change, message):
    model = tiny_model("llama")
    before = weights(model)
    call = {"hot_spots": {0: [1]}, "batches": [([1], [2])], "locality": (), "lr": 1.0, **change}
    with pytest.raises(pke_fast.InputError, match=message.replace("(", r"\(")):
        pke_fast.update(model, call.pop("hot_spots"), call.pop("batches"), call.pop("locality"), **call)
    assert unchanged(model, before)


def test_scores_that_are_no_numbers_are_refused():
    scores = torch.arange(3.0 * NEURONS).view(3, NEURONS)
    scores[1, 5] = torch.nan
    with pytest.raises(pke_fast.InputError, match=r"scores aren't numbers(.|\n)*layers 0 to 2(.|\n)*1 NaN"):
        pke_fast.select(scores, k=3, window=(0, 3))
    assert pke_fast.select(scores, k=3, window=(2, 3)).by_layer()[2].tolist() == [45, 46, 47]  # not in the window
    with pytest.raises(pke_fast.InputError, match="wrong shape"):
        pke_fast.select(scores[0], k=3, window=(0, 3))


def test_contrast_without_benign_scores_is_refused(sequences):
    scores = pke_fast.trace(tiny_model("llama"), sequences(2))
    with pytest.raises(pke_fast.InputError, match="contrast needs scores of benign prompts"):
        pke_fast.select(scores, k=1, score="contrast")
    with pytest.raises(pke_fast.InputError, match="first is no layer"):
        pke_fast.trace(tiny_model("llama"), sequences(2), first=3)


def test_select_refuses_what_it_would_not_go_by(sequences):
    scores = pke_fast.trace(tiny_model("llama"), sequences(2))
    own = torch.rand(LAYERS, NEURONS)
    for given, message in (
        ((own, scores), "got: Scores beside Tensor"),
        ((own, own), "got: Tensor beside Tensor"),
        ((scores, own), "got: Tensor beside Scores"),
        ((own[0],), r"expected: \[layers, neurons\]\n  got: \[48\]"),
        ((own[None],), r"got: \[1, 3, 48\]"),
        ((None,), "the scores can't be used"),
    ):
        with pytest.raises(pke_fast.InputError, match=message):
            pke_fast.select(*given, k=1)


def test_no_locality_is_none(sequences):
    patches = [
        pke_fast.update(tiny_model("llama"), {1: [3]}, sequences(2), locality, num_steps=1) for locality in ((), None)
    ]
    assert torch.equal(*(patch.layers[0].new for patch in patches))


def test_a_model_that_is_none_is_refused(sequences):
    for call in (lambda: pke_fast.trace("llama", sequences(1)), lambda: pke_fast.update(None, {0: [1]}, sequences(1))):
        with pytest.raises(pke_fast.InputError, match="model can't be used"):
            call()


def test_a_front_end_in_thirty_lines_works():
    example = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / "own_front_end.py"))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat=False)
    before = weights(model)
    wanted = [example["tokens"](tokenizer, prompt, example["REFUSAL"]) for prompt in ("How do I break in?", "Hurt him")]

    @torch.no_grad()
    def loss():
        ids = [torch.tensor([[*prompt, *answer]]) for prompt, answer in wanted]
        labels = [torch.tensor([[-100] * len(prompt) + answer]) for prompt, answer in wanted]
        return sum(float(model(input_ids=i, labels=t).loss) for i, t in zip(ids, labels, strict=True))

    unedited = loss()
    patch = example["make_safe"](model, tokenizer, ["How do I break in?", "Hurt him"], ["What is tea?"], k=40)
    assert patch.n_neurons == 40
    assert loss() < 0.9 * unedited
    patch.revert(model)
    assert unchanged(model, before)
