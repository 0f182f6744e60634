"""The plain ways that pke_fast is compared with do the same work: same scores, losses and weights."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import pke_fast
from pke_fast.bench.dense_adam import DenseAdam
from pke_fast.bench.hooks import trace_by_hooks
from pke_fast.bench.plain_loss import PlainLoss
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded
from pke_fast.structure import find_structure
from pke_fast.testing import tiny_model

CONFIG = PKEConfig(
    batch_size=3, locality_batch_size=2, lr=1e-2, lr_end=1.0, w_kl=0.5, micro_batch_tokens=48, projections=("down",)
)
NEURONS = {1: torch.tensor([0, 7, 31]), 2: torch.tensor([5, 47])}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("few_logits", [False, True])
def test_hooks_give_the_scores_of_trace(family: str, few_logits: bool, sequences) -> None:
    model = tiny_model(family).requires_grad_(False)
    chosen = sequences(7)
    ours = pke_fast.trace(model, chosen)
    change, path = trace_by_hooks(find_structure(model), chosen, pad_id=0, micro_batch_tokens=40, few_logits=few_logits)
    assert difference(change, ours.weight_change) < 1e-4
    assert difference(path, ours.activation_path) < 1e-4
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_in_bf16(sequences) -> None:
    model = tiny_model("llama", dtype="bf16").requires_grad_(False)
    ours = pke_fast.trace(model, sequences(7))
    change, path = trace_by_hooks(find_structure(model), sequences(7), pad_id=0, micro_batch_tokens=40)
    assert change.dtype == path.dtype == torch.float32
    assert difference(change, ours.weight_change) < 2e-2
    assert difference(path, ours.activation_path) < 2e-2


@contextmanager
def dense(model, neurons, lr: float, requests: list[Encoded], locality: list[Encoded]):
    structure = find_structure(model.requires_grad_(False))
    loss = PlainLoss(structure, requests, locality, CONFIG, pad_id=0)
    adam = DenseAdam(structure, neurons, lr)
    try:
        yield loss, adam
    finally:
        adam.restore()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_steps_end_at_the_weights_of_update(family: str, sequences) -> None:
    requests, locality = sequences(5, seed=1), sequences(4, seed=2)
    model = tiny_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    patch = pke_fast.update(
        model, NEURONS, requests, locality, **{**CONFIG.as_dict(), "num_steps": 4, "stop_loss": 0.0}
    )
    wanted = {part.weight: model.get_parameter(part.weight).detach() - before[part.weight] for part in patch.layers}
    patch.revert(model)
    with dense(model, NEURONS, 1e-2, requests, locality) as (loss, adam):
        for number in range(4):
            with adam.gradients():
                loss.backward(number)
            adam.step()
        for change, target in zip(adam.changes(), wanted.values(), strict=True):
            assert difference(change, target) < 1e-3
            assert torch.equal(change != 0, target != 0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_few_logits_are_the_same_loss(sequences) -> None:
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    weight = structure.down_weight(1).requires_grad_()
    found = []
    for few in (False, True):
        loss = PlainLoss(structure, sequences(5), sequences(4, seed=2), CONFIG, pad_id=0, few_logits=few)
        with torch.no_grad():
            weight.add_(0.05)
        found.append((*loss.backward(0), weight.grad))
        with torch.no_grad():
            weight.sub_(0.05)
        weight.grad = None
    (edit, kl, grad), (other_edit, other_kl, other_grad) = found
    assert kl > 1e-4
    assert (other_edit, other_kl) == pytest.approx((edit, kl), rel=1e-5)
    assert difference(other_grad, grad) < 1e-5


def test_a_kl_that_does_not_pull(sequences) -> None:
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    weight = structure.down_weight(2).requires_grad_()
    grads = []
    for w_kl, pulls in ((0.0, True), (0.5, False), (0.5, True)):
        loss = PlainLoss(structure, sequences(3), sequences(2, seed=2), CONFIG.replace(w_kl=w_kl), pad_id=0)
        with torch.no_grad():
            weight.add_(0.05)
        _, kl = loss.backward(0, kl_gradient=pulls)
        assert (kl > 0) == bool(w_kl)
        with torch.no_grad():
            weight.sub_(0.05)
        grads.append(weight.grad)
        weight.grad = None
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])
