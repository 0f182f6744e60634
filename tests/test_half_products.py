"""Products in half precision made in fp32: as accurate as torch's, the same in every run, and put away afterwards."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

import pke_fast
from pke_fast.half_products import LEAST_ROWS, fast_half_products
from pke_fast.kernels import products
from pke_fast.modes import eval_mode, evaluating
from pke_fast.proving import assert_as_accurate, poisoned_memory
from pke_fast.testing import FAMILIES, LAYERS, tiny_model

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_instructions(monkeypatch):
    """A CPU that has no instructions for half precision, whatever this one has; weights in many parts."""
    monkeypatch.setattr(products, "without_instructions", lambda dtype: dtype in HALVES)
    monkeypatch.setattr(products, "PART_ELEMENTS", 300)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(x, weight, bias, transposed):
    if not transposed:
        return F.linear(x, weight, bias)
    return (
        x @ weight if bias is None else torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[1])
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (3, 5), (0,), (2, 4, 3)])
def test_products_are_as_accurate_as_torchs(shape, with_bias, transposed, dtype):
    product = products.matmul if transposed else products.linear
    inputs, outputs = 37, 53  # a part has 8 rows of 37, or 5 of 53; the last is not whole
    x = drawn(*shape, inputs, dtype=dtype)
    weight = drawn(*((inputs, outputs) if transposed else (outputs, inputs)), dtype=dtype, seed=1)
    bias = drawn(outputs, dtype=dtype, seed=2) if with_bias else None
    truth = plain(x.double(), weight.double(), None if bias is None else bias.double(), transposed)
    with poisoned_memory():
        ours = product(x, weight, bias)
    assert (ours.dtype, ours.shape) == (dtype, truth.shape)
    assert_as_accurate(ours, plain(x, weight, bias, transposed), truth)
    assert torch.equal(ours, product(x, weight, bias))


def test_few_rows_are_torchs_own_where_there_is_no_way_back(monkeypatch):
    """Torch's product of one row with a weight's rows is fast: it reads the weight once."""
    made = []
    ours = products.linear
    monkeypatch.setattr(products, "linear", lambda x, *more: made.append(len(x)) or ours(x, *more))
    layer = nn.Linear(16, 4).bfloat16().requires_grad_(False)
    with fast_half_products(layer):
        for rows in (LEAST_ROWS - 1, LEAST_ROWS):
            x = drawn(rows, 16, dtype=torch.bfloat16)
            with torch.no_grad():
                assert_as_accurate(
                    layer(x),
                    F.linear(x, layer.weight, layer.bias),
                    F.linear(x.double(), layer.weight.double(), layer.bias.double()),
                )
            assert made == [LEAST_ROWS] * (rows == LEAST_ROWS)
        layer(drawn(1, 16, dtype=torch.bfloat16).requires_grad_())
    assert made == [LEAST_ROWS, 1]


@pytest.mark.parametrize("layer", [nn.Linear(16, 4), Conv1D(4, 16)])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16)])
def test_what_comes_out_may_be_written_to(layer, shape):
    """Some models clamp it in place, or add to it: it is no view, and gradients go through as ever."""
    layer = copy.deepcopy(layer).bfloat16().requires_grad_(False)
    beside = drawn(*shape[:-1], 4, dtype=torch.bfloat16, seed=1).requires_grad_()
    x = drawn(*shape, dtype=torch.bfloat16)
    with fast_half_products(layer):
        for needed in (True, False):
            x.requires_grad_(needed)
            out = layer(x)
            assert not out._is_view()
            out.clamp_(-0.5, 0.5).add_(beside).sum().backward()
    assert (x.grad is not None, beside.grad is not None) == (True, True)


def test_an_input_of_another_dtype_is_refused_as_torch_refuses_it():
    layer = nn.Linear(16, 4).bfloat16().requires_grad_(False)
    with fast_half_products(layer), pytest.raises(RuntimeError, match="dtype"):
        layer(drawn(9, 16, dtype=torch.float32))


def test_no_graph_is_kept_by_the_parts():
    x, weight = drawn(9, 16, dtype=torch.bfloat16).requires_grad_(), drawn(4, 16, dtype=torch.bfloat16, seed=1)
    assert not products.linear(x, weight).requires_grad
    assert not products.matmul(x, weight.T.contiguous()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = drawn(9, 16, dtype=dtype), drawn(4, 16, dtype=dtype, seed=1)
    assert not products.by_parts(weight)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert torch.equal(products.matmul(x, weight.T), x @ weight.T)


def test_tensors_without_data_are_left_to_torch():
    """A plan is made on those, of what a GPU takes too."""
    with FakeTensorMode():
        weight = torch.empty(4, 16, dtype=torch.bfloat16)
        assert not products.by_parts(weight)
        assert products.linear(torch.empty(9, 16, dtype=torch.bfloat16), weight).shape == (9, 4)
    assert not products.by_parts(torch.empty(4, 16, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_and_its_gradients_are_as_accurate_as_torchs(family, dtype):
    """Logits and the embedding's gradient, against the same weights in fp32."""
    ids = torch.arange(24).view(2, 12)

    def run(model):
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        (grad,) = torch.autograd.grad((logits.float() * drawn(*logits.shape, dtype=torch.float32)).sum(), embedded)
        return logits.detach(), grad

    model = tiny_model(family, dtype="bf16" if dtype == torch.bfloat16 else "fp16")
    truth = run(copy.deepcopy(model).float())
    torchs = run(model)
    with fast_half_products(model):
        made = [module for module in model.modules() if "forward" in vars(module)]
        ours, again = run(model), run(model)
    assert len(made) >= 4 * LAYERS  # Phi-3 has the fewest in a layer
    for name, mine, theirs, true in zip(("logits", "gradient"), ours, torchs, truth, strict=True):
        assert_as_accurate(mine, theirs, true, name)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def test_layers_are_as_they_were_afterwards():
    model = tiny_model("llama", dtype="bf16")
    theirs = model.lm_head.forward = partial(nn.Linear.forward, model.lm_head)  # as accelerate gives one
    with evaluating(model):
        changed = [module for module in model.modules() if "forward" in vars(module)]
        assert model.model.layers[0].mlp.down_proj in changed
        assert model.lm_head.forward is theirs
    assert [module for module in model.modules() if "forward" in vars(module)] == [model.lm_head]
    full = tiny_model("llama")
    with eval_mode(full):
        assert not any("forward" in vars(module) for module in full.modules())


def test_weights_that_learn_get_their_gradients():
    model = nn.Sequential(nn.Linear(16, 4)).bfloat16()
    with fast_half_products(model):
        model(drawn(9, 16, dtype=torch.bfloat16)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_job_goes_as_with_torchs_products(dtype, monkeypatch):
    """Scores are the same but for roundings of the dtype; an edit learns, and is taken back to the bit."""
    sequences = [([5, 6, 7, 8 + n], [1, 2, 3]) for n in range(4)]
    found = []
    for slow in (True, False):
        monkeypatch.setattr(products, "without_instructions", lambda dtype, slow=slow: slow and dtype in HALVES)
        model = tiny_model("llama", dtype=dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        scores = pke_fast.trace(model, sequences)
        patch = pke_fast.update(model, {1: [1, 2, 3], 2: [4, 5]}, sequences, num_steps=3, batch_size=2)
        assert patch.meta["losses"]["after"]["edit"] < patch.meta["losses"]["before"]["edit"]
        patch.revert(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        found.append((scores.weight_change, scores.activation_path))
    for ours, torchs in zip(*found, strict=True):
        assert float((ours - torchs).norm() / torchs.norm()) < (0.03 if dtype == "bf16" else 0.005)
