"""Every op: schema and fake, reference against plain autograd in fp64, poisoned outputs, the choice of backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pke_fast import ops
from pke_fast.errors import InputError
from pke_fast.kernels import column_grad_norm
from pke_fast.kernels.edit_loss import CHUNK_ELEMENTS
from pke_fast.kernels.glu_score import ACTIVATIONS
from pke_fast.kernels.sparse_columns import read_columns

OFFSETS = torch.tensor([0, 3, 3, 8])  # three requests, one of them empty; two tokens of padding after them
SPANS = [(0, 3), (3, 3), (3, 8)]
T, D, HIDDEN = 10, 17, 6


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_glu_score_against_fp64(act, gated, dtype):
    gate, up = normal(T, D, dtype=dtype), normal(T, D, seed=1, dtype=dtype) if gated else None
    dh = normal(T, D, seed=2, dtype=dtype)
    g, u = gate.double().requires_grad_(), up.double().requires_grad_() if gated else None
    truth = ACTIVATIONS[act](g) * (u if gated else 1)
    truth.backward(dh.double())

    h, mean, peak = torch.ops.pke_fast.glu_score_fwd(gate, up, act, OFFSETS)
    dgate, dup, path = torch.ops.pke_fast.glu_score_bwd(dh, gate, up, act, OFFSETS)
    half_ulp = torch.finfo(dtype).eps / 2
    rtol = 1.01 * half_ulp + 1e-5  # one rounding of an fp32 result
    close = {"rtol": rtol, "atol": 1e-6}
    torch.testing.assert_close(h.double(), truth, **close)
    torch.testing.assert_close(dgate.double(), g.grad, **close)
    assert h.dtype == dgate.dtype == dtype
    if gated:
        torch.testing.assert_close(dup.double(), u.grad, **close)
    size, paths = truth.detach().abs(), (truth.detach() * dh.double()).abs()
    for r, (a, b) in enumerate(SPANS):
        wanted = size[a:b].mean(0) if b > a else torch.zeros(D)
        torch.testing.assert_close(mean[r].double(), wanted.double(), rtol=1e-5, atol=1e-6)
        wanted = size[a:b].amax(0) if b > a else torch.zeros(D)
        torch.testing.assert_close(peak[r].double(), wanted.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(path[r].double(), paths[a:b].sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 63])  # T = 2 takes the Gram form at these sizes, 63 the direct one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_grad_norm_in_both_forms(tokens, dtype, monkeypatch):
    monkeypatch.setattr(column_grad_norm, "BLOCK", 5)  # several blocks, the last one short
    assert column_grad_norm.gram_is_cheaper(tokens, HIDDEN, D) == (tokens == 2)
    offsets = torch.tensor([0, tokens, tokens, 2 * tokens])
    grad, h = normal(2 * tokens + 1, HIDDEN, dtype=dtype), normal(2 * tokens + 1, D, seed=1, dtype=dtype)
    norms = torch.ops.pke_fast.column_grad_norm(grad, h, offsets)
    for r, (a, b) in enumerate([(0, tokens), (tokens, tokens), (tokens, 2 * tokens)]):
        truth = (grad[a:b].double().T @ h[a:b].double()).norm(dim=0)
        torch.testing.assert_close(norms[r].double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edit_loss_against_fp64(kind, cap, dtype):
    n, vocabulary, scale = 9, 50, 0.5
    hidden, head = normal(n, HIDDEN, dtype=dtype), normal(vocabulary, HIDDEN, seed=1, dtype=dtype)
    bias, base = normal(vocabulary, seed=2, dtype=dtype), normal(n, HIDDEN, seed=3, dtype=dtype)
    targets, weights = torch.arange(n) * 5, normal(n, seed=4).abs()

    def logits(x):
        raw = (x @ head.double().T + bias.double()) * scale
        return torch.tanh(raw / cap) * cap if cap else raw

    x = hidden.double().requires_grad_()
    if kind == "ce":
        truth = F.cross_entropy(logits(x), targets, reduction="none")
    else:
        p = torch.log_softmax(logits(base.double()), -1)
        truth = F.kl_div(torch.log_softmax(logits(x), -1), p, log_target=True, reduction="none").sum(-1)
    (truth * weights).sum().backward()
    sides = (targets, None) if kind == "ce" else (None, base)
    losses, grad = torch.ops.pke_fast.edit_loss(hidden, head, bias, *sides, weights, scale, cap)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(losses.double(), truth.detach(), **tolerance)
    torch.testing.assert_close(grad.double(), x.grad, **tolerance)


def test_edit_loss_in_chunks_is_edit_loss_at_once(monkeypatch):
    hidden, head = normal(40, HIDDEN), normal(50, HIDDEN, seed=1)
    arguments = (hidden, head, None, torch.arange(40), None, torch.ones(40), 1.0, 0.0)
    whole = torch.ops.pke_fast.edit_loss(*arguments)
    assert CHUNK_ELEMENTS > 40 * 50
    monkeypatch.setattr("pke_fast.kernels.edit_loss.CHUNK_ELEMENTS", 7 * 50)
    for ours, theirs in zip(torch.ops.pke_fast.edit_loss(*arguments), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sparse_column_grad_accumulates():
    grad, h, into = normal(T, HIDDEN), normal(T, 4, seed=1), normal(4, HIDDEN, seed=2)
    wanted = into + h.T @ grad
    torch.ops.pke_fast.sparse_column_grad(grad, h, into)
    torch.testing.assert_close(into, wanted)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_column_update_is_torchs_adam_and_touches_nothing_else(axis, dtype):
    weight = normal(HIDDEN, D, dtype=dtype) if axis == 1 else normal(D, HIDDEN, dtype=dtype)
    before, neurons = weight.clone(), torch.tensor([0, 3, 16])
    old = read_columns(weight, axis, neurons).float()
    master, moment1, moment2 = old.clone(), torch.zeros_like(old), torch.zeros_like(old)
    truth = old.clone().requires_grad_()
    adam = torch.optim.Adam([truth], lr=0.01)
    for step in range(1, 4):
        truth.grad = normal(3, HIDDEN, seed=step)
        adam.step()
        torch.ops.pke_fast.sparse_column_update(
            weight,
            axis,
            neurons,
            old,
            master,
            moment1,
            moment2,
            truth.grad,
            step,
            0.01,
            0.9,
            0.999,
            1e-8,
            0.0,
            math.inf,
        )
    torch.testing.assert_close(master, truth.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(read_columns(weight, axis, neurons), master.to(dtype))
    others = torch.tensor([i for i in range(D) if i not in neurons.tolist()])
    assert torch.equal(weight.index_select(axis, others), before.index_select(axis, others))


def test_the_bound_and_the_decay_hold_the_change_back():
    weight, neurons = normal(HIDDEN, D), torch.tensor([2])
    old = read_columns(weight, 1, neurons)
    state = [old.clone(), torch.zeros_like(old), torch.zeros_like(old)]
    grad = normal(1, HIDDEN, seed=5)
    torch.ops.pke_fast.sparse_column_update(weight, 1, neurons, old, *state, grad, 1, 1.0, 0.9, 0.999, 1e-8, 0.0, 0.125)
    torch.testing.assert_close((weight[:, 2] - old[0]).abs(), torch.full((HIDDEN,), 0.125))
    moved = state[0].clone()
    torch.ops.pke_fast.sparse_column_update(
        weight,
        1,
        neurons,
        old,
        state[0],
        state[1].zero_(),
        state[2],
        torch.zeros_like(grad),
        1,
        1.0,
        0.9,
        0.999,
        1e-8,
        0.5,
        9.0,
    )
    torch.testing.assert_close(state[0] - old, (moved - old) / 2)  # decay pulls to the old weights


def test_every_op_has_a_schema_a_fake_and_a_reference():
    from torch._subclasses import FakeTensorMode

    assert {"glu_score_fwd", "glu_score_bwd", "column_grad_norm", "select_hotspots"} <= set(ops.OPS)
    for name, op in ops.OPS.items():
        assert callable(ops.implementation(name, "reference"))
        assert hasattr(torch.ops.pke_fast, name)
        assert list(op.implementations)[-1] == "reference"
    with FakeTensorMode():
        gate = torch.empty(T, D, dtype=torch.bfloat16)
        h, mean, _ = torch.ops.pke_fast.glu_score_fwd(gate, gate, "silu", torch.empty(4, dtype=torch.int64))
        assert (h.shape, h.dtype, mean.shape, mean.dtype) == ((T, D), torch.bfloat16, (3, D), torch.float32)


def test_outputs_are_written_whole(monkeypatch):
    """Memory that comes poisoned must not show in a result."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(2**40))

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    gate = normal(T, D)
    for result in torch.ops.pke_fast.glu_score_fwd(gate, gate, "silu", OFFSETS):
        assert torch.isfinite(result).all()
    assert torch.isfinite(torch.ops.pke_fast.column_grad_norm(normal(T, HIDDEN), gate, OFFSETS)).all()
    arguments = (normal(4, HIDDEN), normal(9, HIDDEN), None, torch.arange(4), None, torch.ones(4), 1.0, 0.0)
    assert all(torch.isfinite(result).all() for result in torch.ops.pke_fast.edit_loss(*arguments))


def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch):
    monkeypatch.delenv(ops.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(ops, "available", lambda backend: True)
    assert ops.chosen_backend("select_hotspots") == "native"
    monkeypatch.setattr(ops, "available", lambda backend: backend == "reference")
    assert ops.chosen_backend("select_hotspots") == "reference"
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "native")
    assert ops.chosen_backend("select_hotspots") == "native"  # asked for by name: it raises rather than falls back
    assert ops.chosen_backend("edit_loss") == "reference"
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "reference")
    assert ops.chosen_backend("select_hotspots") == "reference"
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "cuda")
    with pytest.raises(InputError, match="names no backend"):
        ops.chosen_backend("edit_loss")
    with pytest.raises(InputError, match="has no backend 'native'"):
        ops.implementation("edit_loss", "native")
