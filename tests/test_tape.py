"""Replay equals the model's own forward and gradients; packing loses nothing."""

from __future__ import annotations

import pytest
import torch

from pke_fast.batches import pack
from pke_fast.structure import find_structure
from pke_fast.tape import record
from pke_fast.testing import FAMILIES, LAYERS, tiny_model

PAD = 259


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 2])
def test_replay_is_the_models_own_forward(family, first, sequences):
    model = tiny_model(family).requires_grad_(False)
    structure = find_structure(model)
    for batch in pack(sequences(5), 64, PAD):
        kept = record(structure, batch, first)
        short = record(structure, batch, first, upper=False)
        assert len(kept.hidden) == LAYERS - first
        assert len(short.hidden) == 1
        assert torch.equal(kept.hidden[0], short.hidden[0])
        with torch.no_grad():
            assert torch.equal(kept.run(), kept.top)
            assert torch.equal(short.run(), kept.top)
            head_input = structure.finish(kept.top)
            ours = structure.head(head_input)
            if structure.soft_cap:
                ours = torch.tanh(ours / structure.soft_cap) * structure.soft_cap
            own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        assert torch.equal(ours, own)
        assert torch.equal(kept.supervised(kept.top), head_input.flatten(0, 1)[batch.positions])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_models_own(family, sequences):
    model = tiny_model(family).requires_grad_(False)
    structure = find_structure(model)
    (batch,) = pack(sequences(4), 10_000, PAD)
    tape = record(structure, batch, 1, upper=False)
    entered = tape.hidden[0].detach().requires_grad_()
    seen = torch.randn(tape.structure.finish(tape.run(entered)).shape, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        (ours,) = torch.autograd.grad((structure.finish(tape.run(entered)) * seen).sum(), entered)
        grads = []

        def attach(_module, args, kwargs):
            grads.append(args[0].detach().requires_grad_())
            return (grads[0], *args[1:]), kwargs

        with torch.enable_grad():
            handle = structure.layers[1].register_forward_pre_hook(attach, with_kwargs=True)
            out = structure.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            handle.remove()
        (own,) = torch.autograd.grad((out.last_hidden_state * seen).sum(), grads[0])
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


def test_recording_leaves_no_trace(sequences):
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    (batch,) = pack(sequences(3), 10_000, PAD)
    record(structure, batch, 1, upper=False)
    assert all("forward" not in vars(layer) and not layer._forward_pre_hooks for layer in structure.layers)


def test_packing_keeps_every_sequence_once_and_groups_together(sequences):
    made = sequences(20)
    groups = [i // 2 for i in range(20)]
    batches = pack(made, 60, PAD, groups)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(20))
    assert all(sum(g in batch.groups for batch in batches) == 1 for g in range(10))
    for batch in batches:
        assert batch.groups == tuple(groups[row] for row in batch.rows)
        assert list(batch.groups) == sorted(batch.groups)
        assert batch.input_ids.numel() <= 60 or len(set(batch.groups)) == 1
        for row, index in enumerate(batch.rows):
            sequence = made[index]
            mine = batch.owners == row
            assert batch.input_ids[row, : len(sequence.ids)].tolist() == list(sequence.ids)
            assert batch.attention_mask[row].sum() == len(sequence.ids)
            assert batch.targets[mine].tolist() == list(sequence.ids[sequence.prompt_length :])
            length = batch.input_ids.shape[1]
            wanted = [row * length + t - 1 for t in range(sequence.prompt_length, len(sequence.ids))]
            assert batch.positions[mine].tolist() == wanted
            assert batch.nth[mine].tolist() == list(range(sequence.answer_length))


def test_answer_means_weigh_each_answer_alike(sequences):
    (batch,) = pack(sequences(6), 10_000, PAD)
    for first in (1.0, 4.0):
        weights = batch.answer_weights(first)
        sums = torch.zeros(6).index_add_(0, batch.owners, weights)
        torch.testing.assert_close(sums, torch.ones(6))
        for row in range(6):
            mine = weights[batch.owners == row]
            torch.testing.assert_close(mine[0] / mine[-1], torch.tensor(first if len(mine) > 1 else 1.0))
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    sums = torch.zeros(6).index_add_(0, batch.owners, batch.answer_weights(sign=signs))
    torch.testing.assert_close(sums, signs)
