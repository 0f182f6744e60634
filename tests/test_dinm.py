"""DINM, the comparator: its layer against a plain calculation, its edit in both forms."""

from __future__ import annotations

import torch

from pke_fast.config import PKEConfig
from pke_fast.dinm import answer_distances, edit_one_by_one, published_layer
from pke_fast.encoding import Encoded
from pke_fast.module_calls import first_tensor
from pke_fast.pace import Pace
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.testing import LAYERS, NEURONS, tiny_model
from pke_fast.trainer import Trainer

PAD = 259


def test_distances_are_between_the_means_of_the_answers_tokens(sequences):
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    pairs = list(zip(sequences(5), sequences(5, seed=1), strict=True))
    wanted = torch.zeros(LAYERS)
    kept = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: kept.append(out)) for layer in structure.layers]
    for pair in pairs:
        means = []
        for sequence in pair:
            del kept[:]
            model(input_ids=torch.tensor([sequence.ids]))
            start = sequence.prompt_length
            means.append(torch.stack([first_tensor(hidden)[0, start:].mean(0) for hidden in kept]))
        wanted += (means[0] - means[1]).norm(dim=1) / len(pairs)
    for handle in handles:
        handle.remove()
    for tokens in (1, 10_000):
        ours = answer_distances(structure, pairs, pad_id=PAD, micro_batch_tokens=tokens)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_the_published_layer_is_the_farthest_hidden_state():
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    safe, unsafe = [5, 6, 7], [8, 9, 10, 11]
    padded = torch.tensor([[*safe, PAD], unsafe])
    mask = (padded != PAD).long()
    states = model(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
    distances = [float(torch.dist(state[0], state[1])) for state in states[1:]]
    assert published_layer(structure, safe, unsafe, PAD) == max(range(LAYERS), key=distances.__getitem__)


def one_by_one(sequences, **settings):
    model = tiny_model("llama").requires_grad_(False)
    config = PKEConfig.preset("dinm-parity").replace(**{"lr": 1e-2, **settings})
    outcome = edit_one_by_one(
        find_structure(model), 1, sequences(3), sequences(2, seed=1), config, pad_id=PAD, stage=Stages().stage
    )
    return model, outcome


def test_the_parity_edit_changes_one_whole_layer_and_nothing_else(sequences):
    model, outcome = one_by_one(sequences)
    (part,) = outcome.layers
    assert part.layer == 1
    assert part.neurons.tolist() == list(range(NEURONS))
    assert len(outcome.steps) == 30
    assert outcome.after.edit < outcome.before.edit
    changed = [
        name
        for (name, new), (_, old) in zip(model.named_parameters(), tiny_model("llama").named_parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert changed == [part.weight]


def test_the_parity_kl_is_measured_but_does_not_pull(sequences):
    _, free = one_by_one(sequences, w_kl=0.0)
    _, measured = one_by_one(sequences, w_kl=5.0)
    assert torch.equal(free.layers[0].new, measured.layers[0].new)
    assert any(step.kl > 0 for step in measured.steps)


def test_the_parity_edit_goes_at_the_pace_of_its_plan(sequences, monkeypatch):
    """Also once memory ran out: no request begins again with as many tokens."""
    paces, own = [], Trainer.__init__

    def begun(self, *args, pace=None, **more):
        paces.append(pace)
        own(self, *args, pace=pace, **more)

    monkeypatch.setattr(Trainer, "__init__", begun)
    pace = Pace(256, None, 0)
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    config = PKEConfig.preset("dinm-parity").replace(num_steps=1)
    edit_one_by_one(structure, 1, sequences(3), [], config, pad_id=PAD, stage=Stages().stage, pace=pace)
    assert len(paces) == 4
    assert all(each is pace for each in paces)


def test_the_parity_loop_ends_below_the_published_loss(sequences):
    easy = Encoded((1, 2, 3), 1)
    model = tiny_model("llama").requires_grad_(False)
    config = PKEConfig.preset("dinm-parity").replace(lr=2e-2, w_edit=1e-4, num_steps=200)
    outcome = edit_one_by_one(find_structure(model), 2, [easy], [], config, pad_id=PAD, stage=Stages().stage)
    assert len(outcome.steps) < 200
    assert outcome.steps[-1].loss < 1e-4
