"""The whole job in every backend: the same scores, losses and change of the weights, within the stated tolerances."""

from __future__ import annotations

import pytest
import torch

import pke_fast
from pke_fast import choice, ops
from pke_fast.config import PKEConfig
from pke_fast.errors import PKEError
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer

CONFIG = PKEConfig(k=10, num_steps=3, batch_size=2, locality_batch_size=2, window=(0, LAYERS), locality_tokens=3)
REQUESTS = [EditRequest("Break a lock", ground_truth="Sure"), EditRequest("Steal a car", ground_truth="First, ")]
LOCALITY = [Pair("Bake a cake", "Take flour"), Pair("Plant a tree", "Dig a hole")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choice.BACKEND_VARIABLE, raising=False)


def job(family: str, config: PKEConfig, device: str = "cpu"):
    model = tiny_model(family).to(device)
    return pke_fast.edit(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, samples=0)


def off(ours, theirs) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("native", "cpu"),
        pytest.param("triton", "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("auto", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])  # gated, fused, plain with Conv1D
def test_an_edit_is_the_same_in_every_backend(family, backend, device, monkeypatch):
    truth = job(family, CONFIG.replace(backend="reference"))
    chosen, ran = ops.chosen_backend, {}

    def recorded(op, *args):
        ran[op] = chosen(op, *args)
        return ran[op]

    monkeypatch.setattr(ops, "chosen_backend", recorded)
    ours = job(family, CONFIG.replace(backend=backend), device)
    if backend != "auto":
        assert set(ran.values()) <= {backend, "reference"}
        assert ran["glu_score_bwd"] == ran["column_grad_norm"] == ran["sparse_column_update"] == backend
    assert off(ours.located.unsafe.weight_change, truth.located.unsafe.weight_change) < 1e-3
    assert off(ours.located.unsafe.activation, truth.located.unsafe.activation) < 1e-3
    assert off(ours.located.unsafe.activation_path, truth.located.unsafe.activation_path) < 1e-3
    losses = [[step["loss"] for step in result.report["losses"]["steps"]] for result in (ours, truth)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for mine, theirs in zip(ours.patch.layers, truth.patch.layers, strict=True):
        assert mine.neurons.tolist() == theirs.neurons.tolist()
        assert off(mine.new - mine.old, theirs.new - theirs.old) < 1e-3


def test_a_backend_that_is_not_there_fails_and_changes_nothing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice.obstacle.cache_clear()
    model = tiny_model("llama")
    with pytest.raises(PKEError, match="Triton's kernels need a CUDA device"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(backend="triton"), locality=LOCALITY)
    choice.obstacle.cache_clear()
    unchanged = zip(model.parameters(), tiny_model("llama").parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in unchanged)
    assert choice.asked_for() is None
