"""edit_loss: every form against autograd in fp64, by the relative rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast.errors import InputError
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
@pytest.mark.parametrize("shape", [(1, 8, 1), (17, 24, 1000), (3, 40, 4099), (33, 16, 257)])
def test_shapes_that_break_things(form, kind, shape) -> None:
    check(form, *shape, kind, 0.0, torch.float32, bias=False, scale=1.0)


def test_no_position(form) -> None:
    hidden, head = torch.zeros(0, 8, device=form.device), normal(20, 8).to(form.device)
    targets, weights = (torch.zeros(0, dtype=d, device=form.device) for d in (torch.int64, torch.float32))
    losses, grad = torch.ops.pke_fast.edit_loss(hidden, head, None, targets, None, weights, 1.0, 0.0)
    assert (losses.shape, grad.shape) == ((0,), (0, 8))


def test_same_bits_every_time(form) -> None:
    hidden, base, head = (normal(n, 16, seed=n).to(form.device) for n in (7, 7, 3000))
    arguments = (hidden, head, None, None, base, torch.ones(7, device=form.device), 1.0, 0.0)
    first = torch.ops.pke_fast.edit_loss(*arguments)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(torch.ops.pke_fast.edit_loss(*arguments), first, strict=True))


def test_in_chunks_is_at_once(monkeypatch) -> None:
    hidden, head = normal(40, 6), normal(50, 6, seed=1)
    arguments = (hidden, head, None, torch.arange(40), None, torch.ones(40), 1.0, 0.0)
    whole = torch.ops.pke_fast.edit_loss(*arguments)
    assert CHUNK_ELEMENTS > 40 * 50
    monkeypatch.setattr("pke_fast.kernels.edit_loss.CHUNK_ELEMENTS", 7 * 50)
    monkeypatch.setattr("pke_fast.kernels.edit_loss.LEAST_ROWS", 1)
    for ours, theirs in zip(torch.ops.pke_fast.edit_loss(*arguments), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def small(form, monkeypatch):
    """Triton's form with small tiles, chunks of few of them and blocks of few positions; others as they are."""
    if form.backend == "triton":
        triton_form = pytest.importorskip("pke_fast.kernels.edit_loss_triton")
        for name, value in {"TILE": 16, "LOGITS": 3 * 32, "ROWS": 3}.items():
            monkeypatch.setattr(triton_form, name, value)
        for sides, chunks in ((1, 3), (2, 5)):
            assert len(triton_form.chunks_of(3, 70, sides)[0]) == chunks
    return form


@pytest.mark.parametrize(("cap", "near"), [(0.0, False), (30.0, True)])
@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_chunks(small, kind, cap, dtype, near) -> None:
    check(small, 4, 16, 70, kind, cap, dtype, near=near)


def test_one_chunk_holds_the_target_alone(form, monkeypatch) -> None:
    """The sum over the others is still empty after it: nothing is divided by it."""
    if form.backend == "triton":
        triton_form = pytest.importorskip("pke_fast.kernels.edit_loss_triton")
        for name in ("TILE", "LOGITS", "PAD"):
            monkeypatch.setattr(triton_form, name, 1)
    hidden, head, weights = normal(3, 8), normal(4, 8, seed=1), torch.ones(3)
    targets = torch.tensor([0, 1, 3])
    losses, grad = torch.ops.pke_fast.edit_loss(
        *(x.to(form.device) for x in (hidden, head)),
        None,
        targets.to(form.device),
        None,
        weights.to(form.device),
        1.0,
        0.0,
    )
    truth = plain(hidden.double(), head.double(), None, targets, None, weights.double(), 1.0, 0.0)
    torch.testing.assert_close((losses.cpu(), grad.cpu()), tuple(x.float() for x in truth))


def test_takes_what_is_not_contiguous(form) -> None:
    hidden, head, bias, base = (x.to(form.device) for x in (normal(8, 6), normal(8, 40), normal(80), normal(8, 6)))
    targets, weights = (torch.arange(12, dtype=d, device=form.device) for d in (torch.int64, torch.float32))
    for sides in ((targets[::2], None), (None, base.T)):
        strided = (hidden.T, head.T, bias[::2], *sides, weights[::2], 1.0, 0.0)
        dense = [x.contiguous() if isinstance(x, Tensor) else x for x in strided]
        results = [torch.ops.pke_fast.edit_loss(*arguments) for arguments in (strided, dense)]
        for pair in zip(*results, strict=True):
            torch.testing.assert_close(*pair)


def test_gradient_of_a_target_that_is_all_but_certain(form) -> None:
    """Its probability is 1 in fp32, but what the others have left of it still says where to go."""
    if form.backend == "reference":
        pytest.skip("p - 1 is 0 there, as in torch")
    hidden, head = normal(3, 8), normal(20, 8, seed=1)
    head[4] = 4 * hidden.mean(0)
    hidden = hidden.mean(0) * torch.tensor([[1.0], [1.4], [1.8]])
    targets, weights = torch.full((3,), 4), torch.ones(3)
    truth = plain(hidden.double(), head.double(), None, targets, None, weights.double(), 1.0, 0.0)
    assert float(truth[0].max()) < 1e-3
    assert float(truth[0].min()) < 1e-8
    here = [x.to(form.device) for x in (hidden, head)]
    losses, grad = torch.ops.pke_fast.edit_loss(
        *here, None, targets.to(form.device), None, weights.to(form.device), 1.0, 0.0
    )
    for ours, true in zip((losses, grad), truth, strict=True):
        torch.testing.assert_close(ours.cpu().double(), true, rtol=1e-4, atol=0)


def test_a_target_that_is_no_token_shows(form) -> None:
    if form.backend != "triton":
        pytest.skip("torch raises")
    hidden, head, weights = (x.to(form.device) for x in (normal(3, 8), normal(20, 8, seed=1), torch.ones(3)))
    targets = torch.tensor([-1, 4, 20], device=form.device)
    for result in torch.ops.pke_fast.edit_loss(hidden, head, None, targets, None, weights, 1.0, 0.0):
        finite = result.isfinite().reshape(3, -1)
        assert finite.all(1).tolist() == finite.any(1).tolist() == [False, True, False]


def test_refuses_what_it_is_not_made_for(form) -> None:
    if form.backend == "reference":
        pytest.skip("torch's own errors")
    good = {"hidden": normal(3, 8), "head": normal(20, 8), "bias": normal(20), "targets": torch.arange(3)}
    good |= {"base_hidden": None, "weights": torch.ones(3)}
    wrong = [("hidden", normal(3, 8).double()), ("hidden", normal(24)), ("head", normal(20, 7)), ("bias", normal(19))]
    wrong += [("head", normal(0, 8)), ("head", normal(20, 8).half()), ("targets", torch.arange(4)), ("targets", None)]
    wrong += [("targets", torch.arange(3).int()), ("base_hidden", normal(3, 8)), ("weights", torch.ones(3).double())]
    for name, value in wrong:
        arguments = [x if x is None else x.to(form.device) for x in {**good, name: value}.values()]
        with pytest.raises(InputError, match=name):
            torch.ops.pke_fast.edit_loss(*arguments, 1.0, 0.0)
    with pytest.raises(InputError, match="soft_cap"):
        torch.ops.pke_fast.edit_loss(*(x if x is None else x.to(form.device) for x in good.values()), 1.0, -1.0)


def test_memory_is_an_eighth_of_torchs(form) -> None:
    """Llama 3's vocabulary, 1,024 positions in bf16, against the fp32 logits and their gradient alone."""
    if form.backend != "triton":
        pytest.skip("for Triton's form")
    from pke_fast.kernels.edit_loss_triton import _Sweep

    positions, vocabulary = 1024, 128256
    hidden, head = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (positions, vocabulary))
    for sides in (1, 2):
        sweep = _Sweep(hidden, head, None, 1.0, 0.0, sides)
        tensors = [x for x in (*sweep.logits, sweep.part, sweep.acc, sweep.partials) if x is not None]
        assert 8 * sum(x.nbytes for x in tensors) <= 2 * 4 * positions * vocabulary
