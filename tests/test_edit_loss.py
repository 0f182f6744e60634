"""edit_loss: every form against autograd in fp64, by the relative rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast.kernels.edit_loss import CHUNK_ELEMENTS
from pke_fast.proving import assert_as_accurate, poisoned_memory

pytestmark = pytest.mark.op("edit_loss")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(hidden, head, bias, targets, base, weights, scale, cap) -> tuple[Tensor, Tensor]:
    """What torch computes in the dtype that it is given, with the logits in fp32 or better, as models have them."""

    def log_p(x: Tensor) -> Tensor:
        raw = F.linear(x, head, bias)
        raw = (raw if raw.dtype == torch.float64 else raw.float()) * scale
        return torch.log_softmax(torch.tanh(raw / cap) * cap if cap else raw, -1)

    x = hidden.detach().requires_grad_()
    if targets is not None:
        losses = F.nll_loss(log_p(x), targets, reduction="none")
    else:
        losses = F.kl_div(log_p(x), log_p(base), log_target=True, reduction="none").sum(-1)
    (losses * weights).sum().backward()
    return losses.detach(), x.grad


def check(form, n, hidden_size, vocabulary, kind, cap, dtype, bias=True, near=False, scale=0.5) -> None:
    hidden = normal(n, hidden_size, dtype=dtype)
    head = (normal(vocabulary, hidden_size, seed=1) * (3 / hidden_size**0.5)).to(dtype)
    biases = normal(vocabulary, seed=2, dtype=dtype) if bias else None
    base = hidden + 0.05 * normal(n, hidden_size, seed=3, dtype=dtype) if near else normal(n, hidden_size, seed=3)
    base = base.to(dtype)
    targets = torch.arange(n) * 5 % vocabulary
    if near:  # the target is nearly certain: its gradient is a small difference
        hidden = (hidden + 8 * head[targets] / head[targets].float().square().sum(1, keepdim=True)).to(dtype)
    weights = normal(n, seed=4).abs()
    sides = (targets, None) if kind == "ce" else (None, base)
    wide = [None if x is None else x.double() if x.is_floating_point() else x for x in (hidden, head, biases, *sides)]
    truth = plain(*wide, weights.double(), scale, cap)
    torchs = plain(hidden, head, biases, *sides, weights, scale, cap)
    here = [None if x is None else x.to(form.device) for x in (hidden, head, biases, *sides, weights)]
    with poisoned_memory():
        losses, grad = torch.ops.pke_fast.edit_loss(*here, scale, cap)
    assert (losses.dtype, grad.dtype) == (torch.float32, dtype)
    for name, ours, theirs, true in zip(("losses", "grad"), (losses, grad), torchs, truth, strict=True):
        assert_as_accurate(ours, theirs, true, name)


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("near", [False, True])
def test_against_fp64(form, kind, cap, dtype, near) -> None:
    check(form, 9, 16, 50, kind, cap, dtype, near=near)


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (63, 24, 1000), (3, 40, 4099), (130, 16, 257)])
def test_shapes_that_break_things(form, kind, shape) -> None:
    check(form, *shape, kind, 0.0, torch.float32, bias=False, scale=1.0)


def test_no_position(form) -> None:
    hidden, head = torch.zeros(0, 8, device=form.device), normal(20, 8).to(form.device)
    targets, weights = (torch.zeros(0, dtype=d, device=form.device) for d in (torch.int64, torch.float32))
    losses, grad = torch.ops.pke_fast.edit_loss(hidden, head, None, targets, None, weights, 1.0, 0.0)
    assert (losses.shape, grad.shape) == ((0,), (0, 8))


def test_same_bits_every_time(form) -> None:
    hidden, base, head = (normal(n, 16, seed=n).to(form.device) for n in (30, 30, 3000))
    arguments = (hidden, head, None, None, base, torch.ones(30, device=form.device), 1.0, 0.0)
    first = torch.ops.pke_fast.edit_loss(*arguments)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(torch.ops.pke_fast.edit_loss(*arguments), first, strict=True))


def test_in_chunks_is_at_once(monkeypatch) -> None:
    hidden, head = normal(40, 6), normal(50, 6, seed=1)
    arguments = (hidden, head, None, torch.arange(40), None, torch.ones(40), 1.0, 0.0)
    whole = torch.ops.pke_fast.edit_loss(*arguments)
    assert CHUNK_ELEMENTS > 40 * 50
    monkeypatch.setattr("pke_fast.kernels.edit_loss.CHUNK_ELEMENTS", 7 * 50)
    for ours, theirs in zip(torch.ops.pke_fast.edit_loss(*arguments), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
