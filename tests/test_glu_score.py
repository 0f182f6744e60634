"""glu_score_fwd and glu_score_bwd: every form against autograd in fp64, by the relative rule."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf, pi

import pytest
import torch
from torch import Tensor

from pke_fast.choice import using
from pke_fast.errors import InputError
from pke_fast.kernels.glu_score import ACTIVATIONS
from pke_fast.proving import assert_as_accurate, poisoned_memory

pytestmark = pytest.mark.op("glu_score_fwd")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OFFSETS = [0, 3, 3, 8]  # three requests, one of them empty; tokens after them belong to none


@dataclass(frozen=True)
class Form:
    """As the fixture `form`, for tests of one form alone."""

    backend: str
    device: str


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unchanged(x: Tensor, old: Tensor) -> bool:
    return bool(((x == old) | ((x != x) & (old != old))).all())  # NaN too


def plain(dh: Tensor, gate: Tensor, up: Tensor | None, act: str, offsets: list[int], mask: Tensor) -> dict[str, Tensor]:
    """What torch computes in the dtype that it is given: the truth in fp64, the yardstick in the model's own."""
    gate = gate.detach().requires_grad_()
    up = None if up is None else up.detach().requires_grad_()
    h = ACTIVATIONS[act](gate) if up is None else ACTIVATIONS[act](gate) * up
    h.backward(dh)
    size, path = (torch.where(mask[:, None], x.detach().abs(), 0) for x in (h, h * dh))
    spans = list(pairwise(offsets))
    counts = [max(1, int(mask[a:b].sum())) for a, b in spans]
    zeros = size.new_zeros(1, size.shape[1])

    def rows(of: list[Tensor]) -> Tensor:
        return torch.stack(of) if of else zeros[:0]

    result = {
        "h": h.detach(),
        "mean": rows([size[a:b].sum(0) / n for (a, b), n in zip(spans, counts, strict=True)]),
        "peak": rows([torch.cat([size[a:b], zeros]).amax(0) for a, b in spans]),
        "dgate": gate.grad,
        "path": rows([path[a:b].sum(0) for a, b in spans]),
    }
    return result if up is None else {**result, "dup": up.grad}


def run(form, dh, gate, up, act, offsets, mask=None, fused=False) -> dict[str, Tensor]:
    """The op in one form, in memory that comes poisoned; the inputs are checked to be as they were."""
    device = form.device
    tensors = [None if x is None else x.to(device) for x in (dh, gate, up, mask)]
    before = [None if x is None else x.clone() for x in tensors]
    bounds = torch.tensor(offsets, device=device)
    with poisoned_memory():
        h, mean, peak = torch.ops.pke_fast.glu_score_fwd(*tensors[1:3], act, bounds, tensors[3], fused)
        dgate, dup, path = torch.ops.pke_fast.glu_score_bwd(*tensors[:3], act, bounds, tensors[3], fused)
    assert all(x is None or unchanged(x, old) for x, old in zip(tensors, before, strict=True))
    assert h.dtype == dgate.dtype == gate.dtype
    assert mean.dtype == peak.dtype == path.dtype == torch.float32
    result = {"h": h, "mean": mean, "peak": peak, "dgate": dgate, "path": path}
    return {k: v.cpu() for k, v in ({**result, "dup": dup} if up is not None else result).items()}


def check(form, tokens, neurons, act, gated, dtype, offsets, mask=None) -> None:
    dh, gate = normal(tokens, neurons, seed=2, dtype=dtype), normal(tokens, neurons, dtype=dtype)
    up = normal(tokens, neurons, seed=1, dtype=dtype) if gated else None
    counted = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    truth = plain(dh.double(), gate.double(), None if up is None else up.double(), act, offsets, counted)
    torchs = plain(dh, gate, up, act, offsets, counted)
    ours = run(form, dh, gate, up, act, offsets, mask)
    for name, result in ours.items():
        assert_as_accurate(result, torchs[name], truth[name], name)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(form, act, gated, dtype) -> None:
    check(form, 10, 17, act, gated, dtype, OFFSETS)


@pytest.mark.parametrize(
    ("tokens", "neurons", "offsets"),
    [
        (1, 1, [0, 1]),
        (63, 1536, [0, 1, 63]),
        (257, 20, [5, 5, 130, 131, 257]),  # tokens before the first request too
        (257, 1, [0, 257]),
        (3, 5001, [0, 2, 3]),
        (70, 33, [70]),  # no request at all
        (4, 9, [4, 4, 4]),  # empty ones only
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_that_break_things(form, tokens, neurons, offsets, dtype) -> None:
    check(form, tokens, neurons, "silu", True, dtype, offsets)


@pytest.mark.parametrize("masked", ["some", "all"])
def test_masked_tokens_count_for_nothing(form, masked) -> None:
    mask = torch.arange(40) % 3 != 0 if masked == "some" else torch.zeros(40, dtype=torch.bool)
    check(form, 40, 19, "gelu_tanh", True, torch.float32, [0, 1, 17, 40], mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_the_same_as_separate(form, dtype) -> None:
    dh, gate, up = (normal(41, 24, seed=s, dtype=dtype) for s in range(3))
    mask = torch.arange(41) % 5 != 0
    apart = run(form, dh, gate, up, "silu", [0, 20, 40], mask)
    fused = run(form, dh, torch.cat([gate, up], 1), None, "silu", [0, 20, 40], mask, fused=True)
    dgate = torch.cat([apart.pop("dgate"), apart.pop("dup")], 1)
    torch.testing.assert_close(fused, {**apart, "dgate": dgate})


def test_strides_make_no_difference(form) -> None:
    dh, gate, up = (normal(41, 24, seed=s) for s in range(3))
    usual = run(form, dh, gate, up, "gelu", [0, 20, 40])
    wide = torch.cat([gate, up], 1)  # rows further apart than they are long
    for strided in ((dh, wide[:, :24], wide[:, 24:]), tuple(x.T.contiguous().T for x in (dh, gate, up))):
        assert not strided[1].is_contiguous()
        torch.testing.assert_close(run(form, *strided, "gelu", [0, 20, 40]), usual)


def test_rows_beyond_two_to_the_31(form) -> None:
    """Three rows whose elements lie more than 2^31 apart; untouched memory costs nothing."""
    if form.device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    dh, gate, up = (normal(3, 16, seed=s, dtype=torch.bfloat16) for s in range(3))
    far = torch.empty(2**32 + 2**20, dtype=torch.bfloat16, device=form.device).as_strided((3, 16), (2**31 + 8, 1))
    far.copy_(gate)
    tensors = (dh.to(form.device), far, up.to(form.device))
    offsets = torch.tensor([0, 3], device=form.device)
    h = torch.ops.pke_fast.glu_score_fwd(*tensors[1:], "silu", offsets)[0]
    dgate = torch.ops.pke_fast.glu_score_bwd(*tensors, "silu", offsets)[0]
    usual = run(form, dh, gate, up, "silu", [0, 3])
    torch.testing.assert_close((h.cpu(), dgate.cpu()), (usual["h"], usual["dgate"]))


def test_same_bits_every_time(form) -> None:
    inputs = [normal(130, 257, seed=s, dtype=torch.bfloat16) for s in range(3)]
    runs = [run(form, *inputs, "silu", [0, 50, 130]) for _ in range(3)]
    assert all(torch.equal(other[name], runs[0][name]) for other in runs[1:] for name in other)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_large_inputs_to_the_activation(form, act) -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, -30.0, 30.0, 88.0, 100.0, 1e4]])
    ones = torch.ones_like(gate)
    truth = plain(ones.double(), gate.double(), ones.double(), act, [0, 1], torch.ones(1, dtype=torch.bool))
    ours = run(form, ones, gate, ones, act, [0, 1])
    torch.testing.assert_close(ours, {k: v.float() for k, v in truth.items()}, rtol=1e-6, atol=1e-11)


def test_nan_shows_in_its_neuron_and_request_alone(form) -> None:
    dh, gate, up = (normal(50, 12, seed=s) for s in range(3))
    gate[40, 7] = torch.nan
    ours = run(form, dh, gate, up, "silu", [0, 30, 50])
    for name in ("mean", "peak", "path"):
        assert ours[name].isnan().nonzero().tolist() == [[1, 7]], name
    for name in ("h", "dgate", "dup"):
        assert ours[name].isnan().nonzero().tolist() == [[40, 7]], name


def test_more_requests_than_are_searched_at_once(form, monkeypatch) -> None:
    monkeypatch.setattr(pytest.importorskip("pke_fast.kernels.triton_ragged"), "SEARCHED", 4)
    check(form, 100, 5, "relu2", True, torch.float32, [1, 2, 2, 5, 9, 48, 49, 90, 90, 96])


def test_native_is_independent_of_the_thread_count() -> None:
    dh, gate, up = (normal(515, 600, seed=s) for s in range(3))
    offsets, results = torch.tensor([0, 100, 515]), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with using("native"):
                results.append(
                    (
                        *torch.ops.pke_fast.glu_score_fwd(gate, up, "silu", offsets),
                        *torch.ops.pke_fast.glu_score_bwd(dh, gate, up, "silu", offsets),
                    )
                )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_where_tiles_end(dtype) -> None:
    """Several blocks of neurons and ranges of tokens, the last ones short; results big enough for huge pages."""
    for tokens, neurons in ((66, 2049), (130, 20000)):
        with using("native"):
            check(Form("native", "cpu"), tokens, neurons, "silu", True, dtype, [1, 65, tokens])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_native_has_no_nan_but_from_nan(act) -> None:
    """Values and slopes have their limits where they exist; the curve between them is fp64's."""
    ends = torch.tensor([inf, -inf, 1e38, -1e38, 1e4, -1e4, 100, -100, 14, -14, 1e-40, -1e-40, 0.0, -0.0])
    gate = torch.cat([ends, torch.linspace(-20, 20, 1001)])[None]
    x = gate.double().clamp(-2e38, 2e38).requires_grad_()
    plainly = {  # without the cancellation of 1 + erf and 1 + tanh
        "silu": x * x.sigmoid(),
        "gelu": x * torch.special.erfc(-x * 0.5**0.5) / 2,
        "gelu_tanh": x * ((8 / pi) ** 0.5 * (x + 0.044715 * x**3)).sigmoid(),
    }
    value = plainly.get(act, ACTIVATIONS[act](x))
    value.sum().backward()
    with using("native"):
        h = torch.ops.pke_fast.glu_score_fwd(gate, None, act, torch.tensor([0, 1]))[0]
        slope = torch.ops.pke_fast.glu_score_bwd(torch.ones_like(gate), gate, None, act, torch.tensor([0, 1]))[0]
    wanted = value.detach().float()
    wanted[gate == inf] = inf
    torch.testing.assert_close(h, wanted, rtol=2e-5 if act == "gelu_tanh" else 6e-7, atol=2e-36)
    finite = gate.abs() < 1e5  # what the fp64 formula makes of 1e38 squared is no yardstick
    torch.testing.assert_close(slope[finite], x.grad.float()[finite], rtol=1e-6, atol=3e-7)
    assert not slope.isnan().any()
    assert slope[0, 1] == slope[0, 3] == 0


def test_native_keeps_nan() -> None:
    gate = normal(70, 40)
    gate[3, 7] = torch.nan
    for offsets in ([0, 10, 70], [0, 70]):
        results = {}
        for backend in ("native", "reference"):
            with using(backend):
                results[backend] = torch.ops.pke_fast.glu_score_fwd(gate, None, "silu", torch.tensor(offsets))
        torch.testing.assert_close(results["native"], results["reference"], equal_nan=True)
        assert results["native"][2].isnan().sum() == 1


@pytest.mark.parametrize("offsets", [[0, 5], [-1, 4], [0, 3, 2, 4]])
def test_native_refuses_offsets_that_lead_elsewhere(offsets) -> None:
    with using("native"), pytest.raises(InputError, match="offsets"):
        torch.ops.pke_fast.glu_score_fwd(torch.zeros(4, 5), None, "silu", torch.tensor(offsets))


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled for the GPU here")
@pytest.mark.parametrize("dh", [torch.zeros(4, 6), torch.zeros(4, 5, dtype=torch.bfloat16)])
def test_bad_gradient(backend, dh) -> None:
    with using(backend), pytest.raises(InputError, match="dh"):
        torch.ops.pke_fast.glu_score_bwd(dh, torch.zeros(4, 5), None, "silu", torch.tensor([0, 4]))


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled for the GPU here")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(4)}, "gate"),
        ({"up": torch.zeros(4, 6)}, "up"),
        ({"up": torch.zeros(4, 5, dtype=torch.float16)}, "up"),
        ({"gate": torch.zeros(4, 5, dtype=torch.float64), "up": None}, "fp32, bf16 or fp16"),
        ({"act": "tanh"}, "act"),
        ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, "offsets"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
        ({"gate": torch.zeros(4, 5), "up": None, "fused": True}, "fused"),
    ],
)
def test_bad_arguments(backend, change, message) -> None:
    usual = {"gate": torch.zeros(4, 5), "up": torch.zeros(4, 5), "act": "silu", "offsets": torch.tensor([0, 4])}
    arguments = {**usual, "mask": None, "fused": False, **change}
    with using(backend), pytest.raises(InputError, match=message):
        torch.ops.pke_fast.glu_score_fwd(*arguments.values())
