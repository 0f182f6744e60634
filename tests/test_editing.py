"""The edit: its gradient is the dense one's, it changes the hot spots alone, it repeats, and it undoes itself."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pke_fast import editing, ops
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.editing import edit_columns
from pke_fast.errors import EditError
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.kinds import PROJECTIONS
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.summary import warnings_of
from pke_fast.tape import record
from pke_fast.testing import FAMILIES, NEURONS, tiny_model
from pke_fast.trainer import Trainer, reached

PAD = 259
HOT_SPOTS = {1: torch.tensor([1, 5, 7, 30]), 2: torch.tensor([0, NEURONS - 1])}
CONFIG = PKEConfig(
    num_steps=8,
    batch_size=3,
    locality_batch_size=4,
    lr=1e-2,
    lr_end=1.0,
    first_token_weight=1.0,
    stop_loss=0.0,
    w_kl=2.0,
    micro_batch_tokens=64,
)


def edited(family, sequences, dtype="fp32", config=CONFIG, hot_spots=HOT_SPOTS):
    model = tiny_model(family, dtype=dtype).requires_grad_(False)
    outcome = edit_columns(
        find_structure(model), hot_spots, sequences(6), sequences(9, seed=1), config, pad_id=PAD, stage=Stages().stage
    )
    return model, outcome


def dense_gradient(model, requests, locality, base, config):
    """The gradient of the whole loss by weight, by the model's own forward, one sequence at a time."""
    weights = dict(model.named_parameters())
    model.requires_grad_(True)
    loss = torch.zeros(())
    for sequence in requests:
        ids = torch.tensor([sequence.ids])
        logits = model(input_ids=ids).logits[0, sequence.prompt_length - 1 : -1]
        weight = torch.ones(sequence.answer_length)
        weight[0] = config.first_token_weight
        ce = F.cross_entropy(logits, ids[0, sequence.prompt_length :], reduction="none")
        loss = loss + config.w_edit * (ce * weight / weight.sum()).sum() / len(requests)
    for sequence in locality:
        ids = torch.tensor([sequence.ids])
        sides = [m(input_ids=ids).logits[0].log_softmax(-1) for m in (model, base)]
        kl = F.kl_div(*sides, log_target=True, reduction="none").sum(-1)
        weight = torch.ones(sequence.answer_length)
        weight[0] = config.first_token_weight
        answer = (kl[sequence.prompt_length - 1 : -1] * weight / weight.sum()).sum()
        within = kl[list(sequence.held)].mean() if sequence.held else 0.0
        loss = loss + config.w_kl * (answer + config.w_prompt * within) / len(locality)
    loss.backward()
    model.requires_grad_(False)
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sparse_gradient_is_the_dense_ones(family, sequences):
    config = CONFIG.replace(batch_size=6, locality_batch_size=9, first_token_weight=3.0)
    model, base = (tiny_model(family).requires_grad_(False) for _ in range(2))
    requests, locality = sequences(6), sequences(9, seed=1)
    locality = [replace(s, held=tuple(range(s.prompt_length - 1))[:nth]) for nth, s in enumerate(locality)]
    assert {len(sequence.held) for sequence in locality} >= {0, 1, 2}
    structure = find_structure(model)
    columns = columns_of(structure, HOT_SPOTS, PROJECTIONS)
    assert {column.projection for column in columns} == set(structure.mlps[1].kinds)
    trainer = Trainer(structure, columns, requests, locality, config, PAD)
    for column in columns:  # away from the base model, where the KL's gradient is zero
        noise = torch.randn(column.old.shape, generator=torch.Generator().manual_seed(column.layer)) * 0.3
        torch.ops.pke_fast.write_columns(column.weight, column.axis, column.neurons, column.old + noise)
    kept = []
    for column in columns:
        column.update = lambda _config, _lr, column=column: kept.append(column.grad.clone())
    step = trainer.step(0)
    dense = dense_gradient(model, requests, locality, base, config)
    for column, ours in zip(columns, kept, strict=True):
        truth = read_columns(dense[column.place.weight], column.axis, column.neurons)
        assert float((ours - truth).norm() / truth.norm()) < 1e-5
    assert step.loss == pytest.approx(config.w_edit * step.edit + config.w_kl * step.kl)
    assert step.kl > 0


def test_losses_are_measured_on_a_sample(sequences, monkeypatch):
    monkeypatch.setattr("pke_fast.trainer.SAMPLE", 4)
    config = CONFIG.replace(batch_size=3, locality_batch_size=4)
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    columns = columns_of(structure, HOT_SPOTS, PROJECTIONS)
    trainer = Trainer(structure, columns, sequences(10), sequences(9, seed=1), config, PAD)
    assert trainer.sampled() == (6, 4)
    advanced = []
    found = trainer.final_losses(advanced.append)
    assert sum(advanced) == 10
    losses = [float(trainer._loss(minibatch, False)) for minibatch in trainer.requests]
    assert len(losses) == 4
    assert found.edit == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    assert found.edit != pytest.approx(sum(losses) / 4, rel=1e-3)
    watched = []
    trainer._watching = lambda batch, _benign, _minibatch: watched.append(len(batch.rows)) or nullcontext()
    assert trainer.edit_loss() == pytest.approx(found.edit, rel=1e-5)
    assert sum(watched) == 10  # detectors see all of them


def test_only_what_steps_come_to_is_run(sequences, monkeypatch):
    """Of more sequences than that an edit is the same, and keeps no more of them."""
    monkeypatch.setattr("pke_fast.trainer.WATCHED", 20)  # where detectors are made
    monkeypatch.setattr("pke_fast.trainer.SAMPLE", 6)
    requests, locality = sequences(10), sequences(30, seed=1)
    config = CONFIG.replace(num_steps=2, detectors=False)
    assert reached(config.replace(detectors=True, projections=PROJECTIONS), 10, 30) == (10, 20)
    assert reached(config.replace(detectors=True, projections=("down",)), 10, 30) == (6, 8)
    assert reached(config, 10, 30) == (6, 8)
    recorded: list[int] = []
    inner = record

    def recording(structure, batch, *rest, **named):
        recorded.extend(batch.rows)
        return inner(structure, batch, *rest, **named)

    monkeypatch.setattr("pke_fast.trainer.record", recording)
    told: dict[str, int] = {}

    @contextmanager
    def stage(name, total):
        told[name] = total
        yield lambda count: told.update({name: told[name] - count})

    def made():
        model = tiny_model("llama").requires_grad_(False)
        return edit_columns(find_structure(model), HOT_SPOTS, requests, locality, config, pad_id=PAD, stage=stage)

    few = made()
    assert len(recorded) == 6 + 8
    assert set(told.values()) == {0}  # progress counts what is run
    monkeypatch.setattr(editing, "reached", lambda _config, *counts: counts)
    monkeypatch.setattr("pke_fast.trainer._reached", lambda count, _size, _config: count)
    every = made()
    assert len(recorded) == 6 + 8 + 10 + 30
    assert few.steps == every.steps
    assert all(torch.equal(a.new, b.new) for a, b in zip(few.layers, every.layers, strict=True))


def test_a_step_of_one_micro_batch_is_one_op(sequences, monkeypatch):
    """Product, Adam and write in one where there is one share of the gradient; the same weights as by two shares."""
    chosen, ran = ops.chosen_backend, []
    monkeypatch.setattr(ops, "chosen_backend", lambda op, *args: ran.append(op) or chosen(op, *args))
    weights = []
    for tokens in (10_000, 1):  # all requests at once, or one by one
        ran.clear()
        config = CONFIG.replace(micro_batch_tokens=tokens, num_steps=1)
        model = tiny_model("llama").requires_grad_(False)
        edit_columns(find_structure(model), HOT_SPOTS, sequences(3), [], config, pad_id=PAD, stage=Stages().stage)
        counts = [ran.count(f"sparse_column_{name}") for name in ("step", "grad", "update")]
        assert counts == ([6, 0, 0] if tokens > 1 else [0, 18, 6])  # two layers, three projections, three requests
        weights.append(torch.cat([find_structure(model).down_weight(layer).flatten() for layer in HOT_SPOTS]))
    before = find_structure(tiny_model("llama").requires_grad_(False))
    base = torch.cat([before.down_weight(layer).flatten() for layer in HOT_SPOTS])
    assert relative(weights[0] - base, weights[1] - base) < 1e-3


def relative(ours, truth):
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_hot_spots_change_and_nothing_else(family, dtype, sequences):
    model, outcome = edited(family, sequences, dtype)
    untouched = tiny_model(family, dtype=dtype)
    for (name, new), (_, old) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        parts = [part for part in outcome.layers if part.weight == name]
        if not parts:
            assert torch.equal(new, old), name
            continue
        (part,) = parts
        expected = old.detach().clone()
        expected.index_copy_(part.axis, part.neurons, part.new.T if part.axis == 1 else part.new)
        assert torch.equal(new, expected)
        assert torch.equal(read_columns(old.detach(), part.axis, part.neurons), part.old)
        assert (part.new != part.old).any(1).all()  # every hot spot moved
    assert outcome.after.edit < outcome.before.edit
    assert outcome.before.kl == pytest.approx(0, abs=1e-6)
    assert outcome.after.kl > 0
    assert [step.step for step in outcome.steps] == list(range(1, 9))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(sequences):
    first, second, other = (
        edited("qwen2", sequences, config=config)[1] for config in (CONFIG, CONFIG, CONFIG.replace(seed=1))
    )
    assert all(torch.equal(a.new, b.new) for a, b in zip(first.layers, second.layers, strict=True))
    assert not all(torch.equal(a.new, b.new) for a, b in zip(first.layers, other.layers, strict=True))
    assert first.steps == second.steps


def test_micro_batches_of_any_size_give_the_same_edit(sequences):
    outcomes = [edited("llama", sequences, config=CONFIG.replace(micro_batch_tokens=n))[1] for n in (1, 50, 10_000)]
    for other in outcomes[1:]:
        for ours, theirs in zip(outcomes[0].steps, other.steps, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        for a, b in zip(outcomes[0].layers, other.layers, strict=True):
            change = a.new - a.old
            assert float((change - (b.new - b.old)).norm() / change.norm()) < 1e-3


def test_it_stops_when_the_safe_answers_are_likely(sequences):
    _, outcome = edited(
        "llama",
        sequences,
        config=CONFIG.replace(num_steps=400, lr=5e-2, stop_loss=0.5, w_kl=0.0, k=1),
        hot_spots={1: torch.arange(NEURONS), 2: torch.arange(NEURONS)},
    )
    assert len(outcome.steps) < 400
    assert outcome.after.edit < 0.6
    assert "stop_loss" in outcome.stopped


def test_what_is_learnt_already_is_left_alone(sequences):
    """Adam's first steps are as long for a small gradient as for a large one: a second edit would unlearn the first."""
    model = tiny_model("llama").requires_grad_(False)
    config = CONFIG.replace(stop_loss=100.0, stop_kl=100.0, detectors=False)
    hot_spots = {1: torch.tensor([3, 4])}
    given = (sequences(4), sequences(4, seed=1), config)
    outcome = edit_columns(
        find_structure(model), hot_spots, *given, pad_id=0, stage=Stages(show=False).stage, unseen=sequences(3, seed=2)
    )
    assert (outcome.steps, outcome.strength, outcome.tried) == ((), 1.0, ())
    assert outcome.before.edit == outcome.after.edit < config.stop_loss
    assert all(torch.equal(part.new, part.old) for part in outcome.layers)
    assert "before any step" in outcome.stopped
    (warning,) = warnings_of(outcome, 0.6)
    assert "likely already" in warning


def test_the_norm_constraint_bounds_every_weights_move(sequences):
    _, outcome = edited("llama", sequences, config=CONFIG.replace(norm_constraint=0.015625))
    for part in outcome.layers:
        assert float((part.new - part.old).abs().max()) <= 0.015625 * (1 + 1e-5)


def test_a_loss_that_becomes_nan_stops_and_puts_the_weights_back(sequences):
    model = tiny_model("llama", dtype="fp16").requires_grad_(False)
    with pytest.raises(EditError, match=r"(nan|inf) at step \d+; the weights were put back"):
        edit_columns(
            find_structure(model),
            HOT_SPOTS,
            sequences(6),
            sequences(9, seed=1),
            CONFIG.replace(lr=1e6, num_steps=50),
            pad_id=PAD,
            stage=Stages().stage,
        )
    assert unchanged(model, "fp16")


@pytest.mark.parametrize("when", [0, 3])
def test_ctrl_c_puts_the_weights_back(when, sequences, monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    step = Trainer.step

    def interrupted(self, number, **kwargs):
        if number == when:
            raise KeyboardInterrupt
        return step(self, number, **kwargs)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit_columns(find_structure(model), HOT_SPOTS, sequences(6), [], CONFIG, pad_id=PAD, stage=Stages().stage)
    assert unchanged(model)


def unchanged(model, dtype="fp32"):
    original = tiny_model("llama", dtype=dtype)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_the_learning_rate_falls_linearly_and_suits_the_weights_by_default(sequences):
    structure = find_structure(tiny_model("llama").requires_grad_(False))
    columns = columns_of(structure, HOT_SPOTS, ("up", "down"))

    def rates(**settings):
        config = CONFIG.replace(num_steps=5, **settings)
        trainer = Trainer(structure, columns, sequences(2), [], config, PAD)
        made = []
        for column in columns:
            column.update = lambda _config, lr: made.append(lr)
        for step in (0, 2, 4):
            trainer.update(step)
        return made

    assert rates(lr=1.0, lr_end=0.5) == pytest.approx([rate for rate in (1.0, 0.75, 0.5) for _ in columns])
    own = [0.01 * float(column.old.square().mean().sqrt()) for column in columns]
    assert rates(lr=None, lr_end=1.0) == pytest.approx(own * 3)


def test_an_update_that_breaks_the_model_in_the_last_step_is_no_success(sequences):
    model = tiny_model("llama", dtype="fp16").requires_grad_(False)
    config = CONFIG.replace(lr=1e9, num_steps=1)
    with pytest.raises(EditError, match="the edited model's loss is nan"):
        edit_columns(find_structure(model), HOT_SPOTS, sequences(4), [], config, pad_id=PAD, stage=Stages().stage)
    assert unchanged(model, "fp16")


def test_layers_below_the_lowest_hot_spot_run_once(sequences):
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    columns = columns_of(structure, HOT_SPOTS, PROJECTIONS)
    trainer = Trainer(structure, columns, sequences(6), sequences(9, seed=1), CONFIG, PAD)
    ran = []
    for layer, module in enumerate(structure.layers):
        module.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    trainer.step(0)
    trainer.final_losses()
    assert set(ran) == set(range(min(HOT_SPOTS), len(structure.layers)))
