"""Detectors: the probe is the fitted one, the model computes what was fitted, and nothing but hot spots changes."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pke_fast import detectors as module
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.detectors import GAINS, LESS, OTHERS, Detectors, detectors_bytes, fit_probe
from pke_fast.editing import edit_columns
from pke_fast.encoding import Encoded
from pke_fast.kernels.glu_score import ACTIVATIONS
from pke_fast.kinds import PROJECTIONS
from pke_fast.pace import LEAST_TOKENS
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.testing import LAYERS, NEURONS, tiny_model
from pke_fast.trainer import GENTLY, Trainer

PAD = 259
HOT_SPOTS = {1: torch.tensor([1, 5, 7, 30]), 2: torch.tensor([0, NEURONS - 1])}
CONFIG = PKEConfig(num_steps=0, batch_size=3, locality_batch_size=4, micro_batch_tokens=64, w_kl=1.0)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 1)


def drawn(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def sides(d=12, n=30):
    """Harmful, benign and other tokens: the first two apart along one direction, both from the rest along another."""
    apart, ended = torch.linalg.qr(drawn(d, 2, 9))[0].T * 6
    return drawn(n, d, 0) + apart + ended, drawn(2 * n, d, 1) - apart + ended, drawn(3 * n, d, 2) - ended


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_the_probe_is_where_the_loss_is_least(bias):
    """Newton's steps in plain form: the loss is convex, so where its gradient is 0 is the least."""
    harmful, benign, others = (part / 3 for part in sides())
    constant = module._constant(torch.cat([harmful, benign]), others)
    x = torch.cat([harmful, benign, others]).double()
    rms = torch.cat([harmful, benign]).double().square().mean().sqrt()
    share = [(harmful, 0.5), (benign, 0.5), (others, module.OTHERS_SHARE)]
    weights = torch.cat([torch.full((len(part),), s / len(part), dtype=torch.float64) for part, s in share])
    y = (torch.arange(len(x)) < len(harmful)).double()
    features = torch.cat([x / rms, (x @ constant.double())[:, None]], 1)
    ridge = 2 * module.RIDGE * torch.ones(features.shape[1], dtype=torch.float64)
    ridge[-1] = 0
    at = torch.zeros_like(ridge)
    for _ in range(100):
        p = torch.sigmoid(features @ at + bias)
        gradient = features.T @ (weights * (p - y)) + ridge * at
        curve = features.T @ (features * (weights * p * (1 - p))[:, None]) + ridge.diag()
        at = at - torch.linalg.solve(curve, gradient)
    assert float(gradient.norm()) < 1e-12
    truth = at[:-1] / rms + at[-1] * constant.double()
    row = fit_probe(harmful, benign, others, constant, bias)
    assert float((row - truth).norm() / truth.norm()) < 1e-5


def test_the_probe_tells_the_sides_apart_and_is_silent_elsewhere():
    harmful, benign, others = sides()
    constant = module._constant(torch.cat([harmful, benign]), others)
    row = fit_probe(harmful, benign, others, constant)
    assert float((harmful @ row).min()) > 0 > float((benign @ row).max())
    assert ((others @ row) < 0).float().mean() > 0.9
    assert torch.equal(row, fit_probe(harmful, benign, others, constant))
    nudged = fit_probe(harmful * (1 + 1e-6), benign, others, constant)
    assert float((row - nudged).norm() / row.norm()) < 1e-4  # whatever the rounding


def test_the_constant_is_about_one_at_last_tokens_and_zero_at_others():
    x, others = drawn(12, 50, 3, 0.5), drawn(12, 50, 5, -0.5)
    constant = module._constant(x, others)
    assert (x @ constant - 1).abs().max() < 0.05  # as many numbers as can be fitted
    assert (others @ constant).abs().max() < 0.05
    x, others = drawn(4000, 10, 4, 1.0), drawn(6000, 10, 6, 0.2)
    gram = x.double().T @ x.double() + others.double().T @ others.double()
    ridge = module.CONSTANT_RIDGE * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    truth = torch.linalg.inv(gram + ridge) @ x.double().sum(0)
    assert torch.allclose(module._constant(x, others).double(), truth, rtol=1e-4)


def trained(family, sequences, config=CONFIG, dtype="fp32", hot_spots=HOT_SPOTS):
    """A model whose edit has begun: with its columns, detectors, trainer, and the gain."""
    model = tiny_model(family, dtype=dtype).requires_grad_(False)
    structure = find_structure(model)
    columns = columns_of(structure, hot_spots, config.edited)
    detectors = Detectors(structure, columns, config)
    requests, locality = sequences(6), sequences(9, seed=1)
    trainer = Trainer(structure, columns, requests, locality, config, PAD, detectors=detectors)
    trainer.edit_loss()
    return model, structure, columns, detectors, trainer


@contextmanager
def inputs_of(structure, kind):
    """The inputs of a projection, by layer, while it lasts."""
    seen = {}
    handles = [
        mlp.place(kind).module.register_forward_pre_hook(lambda _m, args, layer=layer: seen.update({layer: args[0][0]}))
        for layer, mlp in enumerate(structure.mlps)
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2"])
def test_the_model_computes_what_was_fitted(family, sequences, monkeypatch):
    """At the prompts' last tokens the neuron says act(g . x) (c . x), biases counted; it is silent at benign ones."""
    _, structure, _, detectors, trainer = trained(family, sequences)
    made, whole = [], module._fitted
    monkeypatch.setattr(module, "_fitted", lambda *args: made.append((args, whole(*args))) or made[-1][1])
    monkeypatch.setattr(module, "GAINS", (1.0,))
    assert trainer.begin(detectors, lambda _n: None) == 1.0
    assert len(made) == len(HOT_SPOTS)
    for layer, ((_, harmful, benign, direction, size), (row, gate, up, down)) in zip(HOT_SPOTS, made, strict=True):
        mlp, neuron = structure.mlps[layer], int(HOT_SPOTS[layer][row])
        x = torch.cat([harmful.flatten(0, 1), benign.flatten(0, 1)])
        with inputs_of(structure, "down") as seen:
            mlp.module(x[None])
        ours = seen[layer][:, neuron]
        bias = 0.0
        if mlp.gate.bias is not None:
            bias = float(mlp.gate.bias[neuron])
        truth = ACTIVATIONS[mlp.act](x @ gate + bias)
        if mlp.up is not None:
            truth = truth * (x @ up)
        assert torch.allclose(ours, truth, rtol=1e-3, atol=1e-4)
        last, other = ours[: harmful[..., 0].numel()].unflatten(0, harmful.shape[:2]), ours[harmful[..., 0].numel() :]
        assert float(last[:, 0].mean()) > 5 * float(other.abs().mean())
        assert float(direction.norm()) == pytest.approx(1, abs=1e-5)
        # for a gain of 1, a detected prompt moves the stream by as much as the MLP's output is long
        assert float(down.norm() * truth[: len(harmful) * (1 + OTHERS) : 1 + OTHERS].clamp(min=0).mean()) == (
            pytest.approx(size, rel=1e-3)
        )


def test_a_device_without_memory_leaves_the_fit_to_the_cpu(monkeypatch):
    seen = []

    def fitted(_detector, harmful, *_rest):
        seen.append(harmful.device.type)
        if harmful.device.type == "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return 3, harmful[0, 0], harmful[0, 0], harmful[0, 0]

    monkeypatch.setattr(module, "_fitted", fitted)
    detector = SimpleNamespace(down=SimpleNamespace(computed=torch.device("meta")))
    row, *made = module._fitted_where_it_fits(detector, torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.ones(4), 1.0)
    assert (row, seen) == (3, ["meta", "cpu"])
    assert {values.device.type for values in made} == {"cpu"}


def test_what_is_watched_are_the_mlps_inputs_at_the_prompts_last_tokens(sequences):
    model, structure, _, detectors, _ = trained("llama", sequences)
    requests, locality = sequences(6), sequences(9, seed=1)
    for side, whole in zip(detectors._sides, (requests, locality), strict=True):
        assert len(side) == len(whole)
        kept = torch.stack(list(side.values()))
        for sequence in whole:
            with inputs_of(structure, "gate") as seen:
                model(torch.tensor([sequence.ids]))
            truth = torch.stack([seen[layer] for layer in HOT_SPOTS])  # [layers, T, d]
            last = truth[:, sequence.prompt_length - 1]
            nearest = int((kept[:, :, 0] - last).flatten(1).norm(dim=1).argmin())
            assert torch.allclose(kept[nearest, :, 0], last, atol=1e-5)
            for nth in range(1, 1 + OTHERS):  # one of the sequence's other tokens, the same one in every layer
                apart = (truth - kept[nearest, :, nth, None]).abs().amax((0, 2))
                assert int(apart.argmin()) != sequence.prompt_length - 1
                assert float(apart.min()) < 1e-5


@pytest.mark.parametrize(("gain", "lr", "share"), [(1.0, None, GENTLY), (0.0, None, 1.0), (1.0, 0.1, 1.0)])
def test_steps_are_smaller_once_there_are_detectors(gain, lr, share, sequences, monkeypatch):
    monkeypatch.setattr(module, "GAINS", (gain,))
    detectors, trainer = trained("llama", sequences, CONFIG.replace(lr=lr))[-2:]
    assert trainer._lr_left(0) == 1.0
    assert trainer.begin(detectors, lambda _n: None) == gain
    assert trainer._lr_left(0) == share


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gain_of_0_puts_the_weights_back(dtype, sequences, monkeypatch):
    model, _, columns, detectors, trainer = trained("llama", sequences, dtype=dtype)
    losses = iter([1.0, *[2.0] * 20])

    class Rising(Detectors):
        def begin(self, towards, loss, advance):
            return super().begin(towards, lambda: (loss(), next(losses))[1], advance)

    detectors.__class__ = Rising
    assert trainer.begin(detectors, lambda _n: None) == 0.0
    for ours, own in zip(model.parameters(), tiny_model("llama", dtype=dtype).parameters(), strict=True):
        assert torch.equal(ours, own)
    assert all(torch.equal(column.master, column.old) for column in columns)


@pytest.mark.parametrize(
    ("told", "best"),
    [
        ([3.0, 2.0, 1.0, 1.5], GAINS[2]),
        ([1.0, 2.0, 1.5, 0.5, 0.7], LESS[1]),  # the least of GAINS is too much
        ([1.0, 9.0, 5.0, 3.0, 0.9], LESS[2]),
    ],
)
def test_the_loss_turns_and_no_more_gains_are_tried(told, best, sequences):
    _, _, columns, detectors, trainer = trained("llama", sequences)
    asked, losses, steps = [], iter(told), []

    class Turning(Detectors):
        def begin(self, towards, loss, advance):
            return super().begin(towards, lambda: (asked.append(loss()), next(losses))[1], advance)

    detectors.__class__ = Turning
    assert trainer.begin(detectors, steps.append) == trainer.gain == best
    assert len(asked) == len(told) <= len(GAINS)
    assert sum(steps) == detectors.stages
    downs = [column for column in columns if column.projection == "down"]
    assert all(float((column.master - column.old).norm()) > 0 for column in downs)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_loss_doesnt_rise_and_one_neuron_a_layer_changes(family, sequences):
    config = CONFIG.replace(batch_size=6, locality_batch_size=9)  # then what is weighed is everything
    model, _, columns, detectors, trainer = trained(family, sequences, config)
    before, steps = trainer.final_losses(), []
    gain = trainer.begin(detectors, steps.append)
    assert sum(steps) == detectors.stages == len(HOT_SPOTS) + len(GAINS)
    after = trainer.final_losses()
    assert after.edit + config.w_kl * after.kl <= before.edit + 1e-6
    assert gain > 0, "a test of nothing"
    assert after.edit < before.edit
    for column in columns:
        patch = column.patch()
        assert int((patch.new != patch.old).any(1).sum()) == 1
        assert torch.equal(column.master, patch.new)
    for (name, new), old in zip(model.named_parameters(), tiny_model(family).parameters(), strict=True):
        parts = [column.patch() for column in columns if column.place.weight == name]
        expected = old.detach().clone()
        for part in parts:
            expected.index_copy_(part.axis, part.neurons + part.offset, part.new.T if part.axis == 1 else part.new)
        assert torch.equal(new, expected), name


def edited(sequences, config=CONFIG, locality=9, hot_spots=HOT_SPOTS, family="llama"):
    model = tiny_model(family).requires_grad_(False)
    stages = Stages()
    benign = sequences(locality, seed=1) if locality else []
    outcome = edit_columns(
        find_structure(model), hot_spots, sequences(6), benign, config, pad_id=PAD, stage=stages.stage
    )
    return outcome, [stage.name for stage in stages.done]


def test_too_few_sequences_make_no_detectors(sequences, monkeypatch):
    begun = []
    begin = Detectors.begin
    monkeypatch.setattr(Detectors, "begin", lambda self, *args: begun.append(begin(self, *args)))
    for least, changed in ((7, False), (6, True)):
        monkeypatch.setattr(module, "LEAST", least)
        monkeypatch.setattr(module, "GAINS", (1.0,))
        outcome, _ = edited(sequences)
        assert any(not torch.equal(part.old, part.new) for part in outcome.layers) == changed
    assert begun == [0.0, 1.0]


def test_the_steps_hold_what_the_detectors_leave(sequences, monkeypatch):
    monkeypatch.setattr(module, "GAINS", (1.0,))
    detectors, trainer = trained("llama", sequences, CONFIG.replace(num_steps=3))[-2:]
    trainer.begin(detectors, lambda _n: None)
    for number in range(3):
        assert float(trainer.gradients(number)[1]) == pytest.approx(0, abs=1e-6)  # nothing pulls the detectors back
    assert trainer.final_losses().kl > 1e-3  # what is told is how far the unedited model is


def relative(ours, theirs):
    change = torch.cat([(part.new - part.old).flatten() for part in ours.layers])
    other = torch.cat([(part.new - part.old).flatten() for part in theirs.layers])
    return float((change - other).norm() / change.norm())


def test_the_same_bits_again_and_the_same_edit_by_micro_batches_of_any_size(sequences):
    outcome, names = edited(sequences)
    assert "Beginning with detectors" in names
    again = edited(sequences)[0]
    assert outcome.gain == again.gain > 0
    assert all(torch.equal(a.new, b.new) for a, b in zip(outcome.layers, again.layers, strict=True))
    for tokens in (1, 10_000):
        assert relative(outcome, edited(sequences, CONFIG.replace(micro_batch_tokens=tokens))[0]) < 1e-3


def test_the_steps_go_on_from_the_detectors(sequences):
    config = CONFIG.replace(num_steps=1, lr=1e-6, lr_end=1.0)
    begun, stepped = edited(sequences)[0], edited(sequences, config)[0]
    assert 0 < relative(begun, stepped) < 1e-3


@pytest.mark.parametrize(
    ("changes", "locality"),
    [
        ({"detectors": False}, 9),
        ({"norm_constraint": 0.1}, 9),
        ({"projections": ("down",)}, 9),
        ({"projections": ("up", "down")}, 9),
        ({"projections": ("gate", "down")}, 9),
        ({}, 0),
    ],
)
def test_where_there_are_none(changes, locality, sequences):
    outcome, names = edited(sequences, CONFIG.replace(**changes), locality)
    assert "Beginning with detectors" not in names
    assert outcome.gain == 0
    assert all(torch.equal(part.new, part.old) for part in outcome.layers)


def test_at_most_so_many_layers_those_in_the_middle(sequences, monkeypatch):
    monkeypatch.setattr(module, "LAYERS", 1)
    hot_spots = dict.fromkeys(range(LAYERS), torch.tensor([3, 4]))
    outcome, _ = edited(sequences, hot_spots=hot_spots)
    changed = {part.layer for part in outcome.layers if not torch.equal(part.new, part.old)}
    assert changed == {1}
    assert {part.projection for part in outcome.layers} == set(PROJECTIONS)


def test_memory_that_runs_out_is_met_by_smaller_micro_batches(sequences, monkeypatch):
    """While the answers' gradients are made, and again while gains are weighed: what is made is the same."""
    config = CONFIG.replace(micro_batch_tokens=4 * LEAST_TOKENS)
    whole, _ = edited(sequences, config)
    own, calls = Trainer._loss, []

    def failing(self, minibatch, base, scale=0.0):
        if self._watching is None and len(calls) < 20:  # from `begin` on
            calls.append(scale)
            if len(calls) in (2, 15):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return own(self, minibatch, base, scale)

    monkeypatch.setattr(Trainer, "_loss", failing)
    outcome, _ = edited(sequences, config)
    assert calls[1] == 1.0
    assert calls[14] == 0.0
    assert relative(whole, outcome) < 1e-3


def test_the_bytes_that_are_kept(sequences):
    _, structure, _, detectors, _ = trained("llama", sequences)
    kept = sum(tensor.nbytes for side in detectors._sides for tensor in side.values())
    sizes = (15, len(HOT_SPOTS), structure.hidden_size, 4)
    assert kept < detectors_bytes(CONFIG, *sizes)
    monstrous = detectors_bytes(CONFIG, 10**6, *sizes[1:])
    assert 2 * kept / 15 < monstrous / 10**6 < 8 * kept / 15
    assert detectors_bytes(CONFIG.replace(detectors=False), *sizes) == 0
    assert detectors_bytes(CONFIG.replace(norm_constraint=0.1), *sizes) == 0


def test_a_sequence_of_one_token_before_its_answer(sequences):
    """There may be no other token than the prompt's last and the answer's."""
    model = tiny_model("llama").requires_grad_(False)
    short = [Encoded((5, 6), 1), Encoded((7, 8, 9), 1)]
    edit_columns(find_structure(model), HOT_SPOTS, short, sequences(4), CONFIG, pad_id=PAD, stage=Stages().stage)
