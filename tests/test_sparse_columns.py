"""sparse_column_grad, sparse_column_update, sparse_column_step and write_columns: every form against fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pke_fast.choice import using
from pke_fast.errors import InputError
from pke_fast.kernels import sparse_columns_native as native
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.proving import assert_as_accurate, poisoned_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Problem:
    """Selected neurons of one weight with their optimiser state, on one device."""

    def __init__(self, form, axis: int, dtype: torch.dtype, hidden: int = 37, neurons: int = 50, n: int = 9) -> None:
        shape = (hidden, neurons) if axis == 1 else (neurons, hidden)
        self.weight, self.axis = normal(*shape, dtype=dtype).to(form.device), axis
        self.untouched = self.weight.clone()
        order = torch.randperm(neurons, generator=torch.Generator().manual_seed(1))
        self.neurons, self.others = (part.sort().values.to(form.device) for part in (order[:n], order[n:]))
        self.old = read_columns(self.weight, axis, self.neurons).float()
        self.state = [self.old.clone(), torch.zeros_like(self.old), torch.zeros_like(self.old)]

    def update(
        self, grad: Tensor, step: int, weight_decay: float = 0.0, bound: float = math.inf, **adam: float
    ) -> None:
        rest = (step, *{**ADAM, **adam}.values(), weight_decay, bound)
        with poisoned_memory():
            torch.ops.pke_fast.sparse_column_update(
                self.weight, self.axis, self.neurons, self.old, *self.state, grad, *rest
            )

    def step(self, grad_out: Tensor, h: Tensor, step: int) -> None:
        rest = (step, *ADAM.values(), 0.0, math.inf)
        with poisoned_memory():
            torch.ops.pke_fast.sparse_column_step(
                self.weight, self.axis, self.neurons, self.old, *self.state, grad_out, h, *rest
            )

    def check_written(self) -> None:
        """The neurons hold the master, rounded once; nothing else has moved by a bit."""
        written = read_columns(self.weight, self.axis, self.neurons)
        assert torch.equal(written, self.state[0].to(self.weight.dtype))
        kept = [w.index_select(self.axis, self.others) for w in (self.weight, self.untouched)]
        assert torch.equal(*kept)


@pytest.mark.op("sparse_column_grad")
@pytest.mark.parametrize(
    "shape", [(10, 6, 4), (1, 1, 1), (63, 576, 33), (257, 40, 130), (1100, 24, 3), (5, 7, 0), (0, 7, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_accumulates(form, shape, dtype) -> None:
    tokens, hidden, n = shape
    grad, h = normal(tokens, hidden, dtype=dtype), normal(tokens, n, seed=1, dtype=dtype)
    into = normal(n, hidden, seed=2)
    ours = into.to(form.device, copy=True)
    torch.ops.pke_fast.sparse_column_grad(grad.to(form.device), h.to(form.device), ours)
    truth = into.double() + h.double().T @ grad.double()
    assert_as_accurate(ours, into + (h.T @ grad).float(), truth)


@pytest.mark.op("sparse_column_grad")
def test_grad_takes_strided_rows(form) -> None:
    grad, h = normal(30, 24), normal(30, 8, seed=1)
    results = []
    for g, x in ((grad, h), (torch.cat([grad, grad], 1)[:, 24:], h.T.contiguous().T)):
        into = torch.zeros(8, 24, device=form.device)
        torch.ops.pke_fast.sparse_column_grad(g.to(form.device), x.to(form.device), into)
        results.append(into)
    torch.testing.assert_close(*results)


@pytest.mark.op("sparse_column_update")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_torchs_adam_and_touches_nothing_else(form, axis, dtype) -> None:
    problem = Problem(form, axis, dtype)
    parameters = [problem.old.detach().cpu().to(d, copy=True).requires_grad_() for d in (torch.float32, torch.float64)]
    optimisers = [torch.optim.Adam([p], lr=0.01) for p in parameters]
    for step in range(1, 4):
        grad = normal(9, 37, seed=step)
        for parameter, adam in zip(parameters, optimisers, strict=True):
            parameter.grad = grad.to(parameter.dtype)
            adam.step()
        problem.update(grad.to(form.device), step)
    assert_as_accurate(problem.state[0], parameters[0].detach(), parameters[1].detach(), "master")
    problem.check_written()


@pytest.mark.op("sparse_column_update")
def test_bound_and_decay_hold_the_change_back(form) -> None:
    problem = Problem(form, 1, torch.float32)
    grad = normal(9, 37, seed=5).to(form.device)
    problem.update(grad, 1, bound=0.125, lr=1.0)
    change = (problem.state[0] - problem.old).abs()
    torch.testing.assert_close(change, torch.full_like(change, 0.125))
    problem.check_written()
    moved = problem.state[0].clone()
    problem.state[1].zero_()
    problem.update(torch.zeros_like(grad), 1, weight_decay=0.5, bound=9.0, lr=1.0)
    torch.testing.assert_close(problem.state[0] - problem.old, (moved - problem.old) / 2)  # it pulls to the old values


@pytest.mark.op("sparse_column_step")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 130, 1100])
def test_step_is_grad_and_update_in_one(form, axis, dtype, tokens) -> None:
    one, two = Problem(form, axis, dtype), Problem(form, axis, dtype)
    for step in (1, 2):
        grad_out = normal(tokens, 37, seed=step, dtype=dtype).to(form.device)
        h = normal(tokens, 9, seed=9 + step, dtype=dtype).to(form.device)
        one.step(grad_out, h, step)
        grad = torch.zeros_like(two.old)
        torch.ops.pke_fast.sparse_column_grad(grad_out, h, grad)
        two.update(grad, step)
        # Adam's steps have the size of lr whatever the gradient's: a gradient near 0 may turn its sign by rounding.
        torch.testing.assert_close(one.state[1], two.state[1], rtol=1e-4, atol=1e-5)
        off = (one.state[0] - two.state[0]).norm() / (two.state[0] - two.old).norm()
        assert float(off) < 1e-3
        one.check_written()


@pytest.mark.op("write_columns")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_replaces_and_can_be_taken_back(form, axis, dtype) -> None:
    problem = Problem(form, axis, dtype)
    exact = read_columns(problem.weight, axis, problem.neurons)
    new = normal(9, 37, seed=3).to(form.device)
    torch.ops.pke_fast.write_columns(problem.weight, axis, problem.neurons, new)
    problem.state[0] = new
    problem.check_written()
    torch.ops.pke_fast.write_columns(problem.weight, axis, problem.neurons, exact)
    assert torch.equal(problem.weight, problem.untouched)


@pytest.mark.op("write_columns")
def test_write_into_a_part_of_a_tensor(form) -> None:
    """Rows of a fused [2D, d] weight's second half, and a weight that is a transposed view: in place, or refused."""
    whole = normal(20, 6).to(form.device)
    kept, values = whole.clone(), normal(2, 6, seed=1).to(form.device)
    neurons = torch.tensor([1, 9], device=form.device)
    torch.ops.pke_fast.write_columns(whole[10:], 0, neurons, values)
    kept[[11, 19]] = values
    assert torch.equal(whole, kept)
    torch.ops.pke_fast.write_columns(whole.T, 1, neurons, values)
    kept[[1, 9]] = values
    assert torch.equal(whole, kept)


@pytest.mark.op("sparse_column_update")
@pytest.mark.parametrize("view", ["slice", "every other", "transposed"])
@pytest.mark.parametrize("axis", [0, 1])
def test_update_writes_into_weights_of_any_strides(form, axis, view) -> None:
    problem = Problem(form, axis, torch.bfloat16)
    plain, whole = problem.weight, problem.weight.new_full((120, 120), 7.0)
    rows, columns = plain.shape
    problem.weight = {
        "slice": whole[3 : 3 + rows, 5 : 5 + columns],
        "every other": whole[: 2 * rows : 2, 1 : 1 + 2 * columns : 2],
        "transposed": whole.T[:rows, 2 : 2 + columns],
    }[view]
    problem.weight.copy_(plain)
    problem.update(normal(9, 37, seed=5).to(form.device), 1)
    problem.check_written()
    problem.weight.fill_(7.0)
    assert bool((whole == 7.0).all())  # what lies between is as it was


@pytest.mark.op("write_columns")
@pytest.mark.parametrize("source", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_write_rounds_as_torch_does(form, axis, dtype, source) -> None:
    """Ties, denormals, what overflows, infinities and NaN."""
    odd = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0, 3.4e38, 1e-45])
    tiny = torch.tensor([2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 3 * 2.0**-25, 2.0**-133, 2.0**-134, 6e-8])
    ties = (torch.arange(64) * 2**12 + 0x3F800000).to(torch.int32).view(torch.float32)
    spread = normal(150, seed=8) * 10.0 ** (80 * torch.rand(150, generator=torch.Generator().manual_seed(9)) - 42)
    values = torch.cat([odd, tiny, ties, spread]).double().to(source)
    values = torch.cat([values, -values]).reshape(2, -1).to(form.device)
    weight = torch.zeros(values.shape[1], 3) if axis == 1 else torch.zeros(3, values.shape[1])
    weight = weight.to(form.device, dtype)
    torch.ops.pke_fast.write_columns(weight, axis, torch.tensor([0, 2], device=form.device), values)
    written = read_columns(weight, axis, torch.tensor([0, 2], device=form.device))
    torch.testing.assert_close(written, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(written.signbit() & ~written.isnan(), values.signbit() & ~written.isnan())


@pytest.mark.op("write_columns")
@pytest.mark.parametrize("axis", [0, 1])
def test_write_takes_many_neurons_in_any_order_and_strided_values(form, axis) -> None:
    neurons = torch.randperm(2500, generator=torch.Generator().manual_seed(4))[:2100].to(form.device)
    values = normal(21, 2100).T.to(form.device)
    weight = torch.zeros((21, 2500) if axis == 1 else (2500, 21), device=form.device)
    wanted = weight.index_copy(axis, neurons, values.T if axis == 1 else values)
    torch.ops.pke_fast.write_columns(weight, axis, neurons, values)
    assert torch.equal(weight, wanted)


class TestNativeForm:
    """What is refused before anything is changed, and the threads that may not be seen in a result."""

    form = SimpleNamespace(device="cpu")

    @pytest.mark.parametrize("bad", [[-1, 3], [3, 50], [3, 3], [5, 3, 5]])
    def test_refuses_neurons_that_are_not_there_or_there_twice(self, bad) -> None:
        problem = Problem(self.form, 1, torch.float32, n=len(bad))
        problem.neurons = torch.tensor(bad)
        state = [tensor.clone() for tensor in problem.state]
        with using("native"):
            for call in (
                lambda: problem.update(normal(len(bad), 37), 1),
                lambda: problem.step(normal(4, 37), normal(4, len(bad)), 1),
                lambda: torch.ops.pke_fast.write_columns(problem.weight, 1, problem.neurons, problem.old),
            ):
                with pytest.raises(InputError, match=r"(?s)neurons.*(out of range|twice)"):
                    call()
        assert torch.equal(problem.weight, problem.untouched)
        assert all(torch.equal(*pair) for pair in zip(state, problem.state, strict=True))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"neurons": torch.arange(9, dtype=torch.int32)}, "neurons.*int64"),
            ({"weight": torch.zeros(37, 50, dtype=torch.float64)}, "weight.*fp32, bf16 or fp16"),
            ({"weight": torch.zeros(37, 50, 1)}, "weight.*two dimensions"),
            ({"weight": torch.zeros(37, 1).expand(37, 50)}, "weight.*place of its own"),
            ({"weight": torch.zeros(90).as_strided((37, 50), (1, 1))}, "weight.*place of its own"),
            ({"axis": 2}, "axis"),
            ({"master": torch.zeros(9, 36)}, r"master.*\[9, 37\]"),
            ({"master": torch.zeros(9, 37, dtype=torch.bfloat16)}, "master.*fp32"),
            ({"moment1": torch.zeros(37, 9).T}, "moment1.*contiguous"),
            ({"step": 0}, "step"),
            ({"beta1": 1.0}, "beta1"),
            ({"lr": math.nan}, "lr"),
            ({"bound": -1.0}, "bound"),
        ],
    )
    def test_refuses_bad_arguments(self, change, match) -> None:
        given = {"weight": torch.zeros(37, 50), "axis": 1, "neurons": torch.arange(9)}
        given |= {name: torch.zeros(9, 37) for name in ("old", "master", "moment1", "moment2", "grad")}
        given |= {"step": 1, **ADAM, "weight_decay": 0.0, "bound": math.inf} | change
        with pytest.raises(InputError, match="(?s)" + match):
            native.update(**given)

    def test_refuses_to_change_what_others_read(self) -> None:
        weight, neurons = normal(8, 8), torch.tensor([1, 3])
        with pytest.raises(InputError, match="memory of its own"):
            native.write(weight, 1, neurons, weight[:2])
        with pytest.raises(InputError, match="memory of its own"):
            native.grad(normal(8, 8), weight, weight)
        state = [torch.zeros(2, 8) for _ in range(4)]
        with pytest.raises(InputError, match="memory of its own"):
            native.update(weight, 1, neurons, *state, state[3], 1, 0.1, 0.9, 0.999, 1e-8, 0.0, math.inf)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_threads_change_nothing(self, axis) -> None:
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                problem = Problem(self.form, axis, torch.bfloat16, hidden=700, neurons=400, n=300)
                with using("native"):
                    for step in (1, 2):
                        problem.step(normal(200, 700, seed=step), normal(200, 300, seed=3), step)
                results.append([problem.weight, *problem.state])
        finally:
            torch.set_num_threads(threads)
        for others in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


@pytest.mark.op("write_columns")
def test_autograd_sees_the_change(form) -> None:
    weight = normal(6, 8).to(form.device)
    x = normal(2, 8).to(form.device).requires_grad_()
    out = x @ weight.T
    torch.ops.pke_fast.write_columns(weight, 1, torch.tensor([2], device=form.device), normal(1, 6).to(form.device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.op("write_columns")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [*DTYPES, torch.float64])
def test_write_of_any_bits_is_torchs(form, axis, dtype, source) -> None:
    """Ties, subnormals, infinities and NaN, from values that aren't contiguous; the same dtype goes through by bit."""
    bits = torch.randint(-(2**31), 2**31 - 1, (70, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    bits[::2] = bits[::2] >> 16 << 16 | 0x8000  # ties in bf16
    values = bits.view(torch.float32).to(source).T.to(form.device)
    weight = torch.zeros((70, 8) if axis else (8, 70), dtype=dtype, device=form.device)
    neurons = torch.tensor([0, 1, 3, 4, 5, 7], device=form.device)
    torch.ops.pke_fast.write_columns(weight, axis, neurons, values)
    written, expected = read_columns(weight, axis, neurons), values.to(dtype)
    assert torch.equal(written.isnan(), expected.isnan())
    number = torch.int32 if dtype == torch.float32 else torch.int16
    same = written.view(number) == expected.contiguous().view(number)
    assert bool((same if source == dtype else same | expected.isnan()).all())
    assert not read_columns(weight, axis, torch.tensor([2, 6], device=form.device)).any()


@pytest.mark.op("write_columns")
def test_a_neuron_that_is_not_there_touches_nothing(form) -> None:
    """Where the form can't look without waiting for the device, it writes nothing; the others raise."""
    if form.backend != "triton":
        pytest.skip("raises, each in its own way")
    whole = normal(30, 6).to(form.device)
    kept, values = whole.clone(), normal(3, 6, seed=1).to(form.device)
    neurons = torch.tensor([-1, 4, 10], device=form.device)
    torch.ops.pke_fast.write_columns(whole[10:20], 0, neurons, values)
    kept[14] = values[1]
    assert torch.equal(whole, kept)


@pytest.mark.op("sparse_column_step")
def test_same_bits_every_time(form) -> None:
    problems = [Problem(form, 1, torch.float32, hidden=40, n=9) for _ in range(2)]
    for problem in problems:
        problem.step(normal(1100, 40, seed=1).to(form.device), normal(1100, 9, seed=2).to(form.device), 1)
    assert all(torch.equal(*pair) for pair in zip(*(p.state for p in problems), strict=True))


def _replaced(arguments: dict[str, object], **changes: object) -> list[object]:
    return list({**arguments, **changes}.values())


def _refused(form, op: str, arguments: dict[str, object], wrong: dict[str, object]) -> None:
    """Each wrong argument raises InputError, which names it, before anything is changed."""
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    for name, value in wrong.items():
        with pytest.raises(InputError, match=name):
            getattr(torch.ops.pke_fast, op)(*_replaced(arguments, **{name: value}))
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@pytest.mark.op("sparse_column_grad")
def test_grad_refuses_what_it_is_not_made_for(form) -> None:
    if form.backend == "reference":
        pytest.skip("torch's own errors")
    arguments: dict[str, object] = {"grad_out": normal(5, 8), "h": normal(5, 3), "into": normal(3, 8)}
    arguments = {name: x.to(form.device) for name, x in arguments.items() if isinstance(x, Tensor)}
    _refused(form, "sparse_column_grad", arguments, {"grad_out": normal(5, 2, 4).to(form.device)})
    for h in (normal(4, 3), normal(5, 3, dtype=torch.float16), normal(5)):
        _refused(form, "sparse_column_grad", arguments, {"h": h.to(form.device)})
    for into in (normal(3, 7), normal(3, 8).double(), normal(8, 3).T):
        _refused(form, "sparse_column_grad", arguments, {"into": into.to(form.device)})


@pytest.mark.op("sparse_column_update")
def test_update_refuses_what_it_is_not_made_for(form) -> None:
    if form.backend == "reference":
        pytest.skip("torch's own errors")
    problem = Problem(form, 1, torch.float32)
    names = ("old", "master", "moment1", "moment2", "grad")
    state = dict(zip(names, (problem.old, *problem.state, torch.ones_like(problem.old)), strict=True))
    arguments: dict[str, object] = {"weight": problem.weight, "axis": 1, "neurons": problem.neurons, **state}
    arguments |= {"step": 1, **ADAM, "weight_decay": 0.0, "bound": math.inf}
    weights = (problem.weight[0], problem.weight.double(), problem.weight[:1].expand(37, 50))
    neurons = (problem.neurons.int(), problem.neurons[None])
    wrong = [("weight", x) for x in weights] + [("neurons", x) for x in neurons] + [("axis", 2), ("step", 0)]
    wrong += [(name, tensor.half()) for name, tensor in state.items()]
    wrong += [(name, tensor[:, 1:]) for name, tensor in state.items()]
    wrong += [(name, state[name].T.contiguous().T) for name in ("master", "moment1", "moment2")]
    for name, value in wrong:
        _refused(form, "sparse_column_update", arguments, {name: value})
