"""Replay equals the model's own forward and gradients; packing loses nothing."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack

import pytest
import torch

from pke_fast.batches import ANEW, pack, packing
from pke_fast.encoding import Encoded
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
        tape = record(structure, batch, first)
        with torch.no_grad():
            top = tape.run()
            outputs = list(tape.outputs())
            head_input = structure.finish(top)
            ours = structure.head(head_input)
            if structure.soft_cap:
                ours = torch.tanh(ours / structure.soft_cap) * structure.soft_cap
            own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        assert torch.equal(ours, own)
        assert len(outputs) == LAYERS - first
        assert torch.equal(outputs[-1], top)
        assert torch.equal(tape.supervised(top), head_input.flatten(0, 1)[batch.positions])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [None, 0, 1, 2, 100])
def test_gradients_are_the_models_own_however_many_layers_keep_their_graph(family, kept, sequences, tapped):
    model = tiny_model(family).requires_grad_(False)
    structure = find_structure(model)
    (batch,) = pack(sequences(4), 10_000, PAD)
    tape = record(structure, batch, 1)
    with torch.no_grad():
        weights = torch.randn(tape.supervised(tape.run()).shape, generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        ours = [[] for _ in range(LAYERS - 1)]
        for layer, seen in enumerate(ours, 1):
            stack.enter_context(tapped(structure, layer, seen))
        loss = tape.there_and_back(lambda hidden: (hidden * weights).sum(), kept, scale=0.5)
    with ExitStack() as stack, torch.enable_grad():
        theirs = [[] for _ in range(LAYERS - 1)]
        for layer, seen in enumerate(theirs, 1):
            stack.enter_context(tapped(structure, layer, seen))
        out = structure.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        own = (out.last_hidden_state.flatten(0, 1)[batch.positions] * weights).sum()
        own.backward()
    torch.testing.assert_close(loss, own.detach())
    for mine, (wanted,) in zip(ours, theirs, strict=True):
        (grad,) = mine
        torch.testing.assert_close(grad, 0.5 * wanted, rtol=1e-5, atol=1e-7)


def test_layers_that_keep_no_graph_keep_no_memory(sequences, tapped):
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    (batch,) = pack(sequences(4), 10_000, PAD)
    tape = record(structure, batch, 0)
    kept_bytes = []
    for kept in (0, 1, None):
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        most = [0]

        def loss_of(hidden, saved=saved, most=most):
            most[0] = sum(saved.values())  # on the way up, when the most is kept
            return hidden.sum()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), tapped(structure, 0, []):
            tape.there_and_back(loss_of, kept)
        kept_bytes.append(most[0])
    assert kept_bytes[0] < kept_bytes[1] < kept_bytes[2] / (LAYERS - 1.5)


def test_recording_leaves_no_trace(sequences):
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    (batch,) = pack(sequences(3), 10_000, PAD)
    record(structure, batch, 1)
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


@pytest.mark.parametrize("tokens", [250, 700, 10_000])
def test_packing_costs_the_fewest_tokens(tokens):
    lengths = [200, 30, 31, 150, 29, 8, 9, 10, 160]
    made = [Encoded(tuple(range(n)), n - 1) for n in lengths]

    def cost(parts):
        taken = [len(part) * max(lengths[i] for i in part) for part in parts]
        fits = all(size <= tokens or len(part) == 1 for size, part in zip(taken, parts, strict=True))
        return sum(taken) + ANEW * len(parts) if fits else math.inf

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = itertools.product([False, True], repeat=len(order) - 1)
    splits = ([0, *(i + 1 for i, cut in enumerate(found) if cut), len(order)] for found in cuts)
    least = min(cost([order[a:b] for a, b in itertools.pairwise(split)]) for split in splits)
    assert cost(packing(made, tokens)) == least
    assert len(packing(made, tokens)) > 1


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
