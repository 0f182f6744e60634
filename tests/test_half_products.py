"""Products in half precision made in fp32: as accurate as torch's, the same in every run, and put away afterwards."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pke_fast
from pke_fast.half_products import fast_half_products
from pke_fast.kernels import products
from pke_fast.modes import eval_mode, evaluating
from pke_fast.proving import assert_as_accurate, poisoned_memory
from pke_fast.testing import FAMILIES, tiny_model

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
    inputs, outputs = 37, 53  # 8 rows of 37 a part, the last not whole
    x = drawn(*shape, inputs, dtype=dtype)
    weight = drawn(*((inputs, outputs) if transposed else (outputs, inputs)), dtype=dtype, seed=1)
    bias = drawn(outputs, dtype=dtype, seed=2) if with_bias else None
    truth = plain(x.double(), weight.double(), None if bias is None else bias.double(), transposed)
    with poisoned_memory():
        ours = product(x, weight, bias)
    assert (ours.dtype, ours.shape) == (dtype, truth.shape)
    assert_as_accurate(ours, plain(x, weight, bias, transposed), truth)
    assert torch.equal(ours, product(x, weight, bias))


def test_few_rows_are_torchs_own():
    """Torch's product of one row with a weight's rows is fast: it reads the weight once."""
    x, weight = drawn(products.LEAST_ROWS, 16, dtype=torch.bfloat16), drawn(4, 16, dtype=torch.bfloat16, seed=1)
    few = x[: products.LEAST_ROWS - 1]
    assert torch.equal(products.linear(few, weight), F.linear(few, weight))
    assert torch.equal(products.linear(x, weight), (x.float() @ weight.float().T).bfloat16())


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
    assert len(made) >= 3 * len(torchs)
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
def test_an_edit_is_the_one_that_torchs_products_give(dtype, monkeypatch):
    """Scores within roundings of the dtype, the same hot spots' patch to apply and to revert."""
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
