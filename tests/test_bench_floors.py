"""The floors: operations counted by hand at a round size."""

from __future__ import annotations

import pytest
import torch
from floors import SMOLLM2, Shape, kept, step, step_in, tracing
from random_models import random_sequences
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pke_fast.bench import cases
from pke_fast.bench.subjects import Subject
from pke_fast.structure import find_structure
from pke_fast.workbench import laid_out

ROUND = Shape(
    layers=10,
    layer=1000,
    heads=2,
    keys=5,
    hidden=10,
    neurons=20,
    vocabulary=100,
    tokens=50,
    supervised=5,
    length=10,
)


def test_tracing() -> None:
    passes, few, dense, norms = 100_000.0 * 10, 20_000.0, 20_000.0 * 10, 20_000.0 * 10
    assert ROUND.norms == ROUND.columns == 20_000  # the Gram form would take 30,000
    assert tracing(ROUND) == {
        "pke_fast, every layer run again": 3 * passes + few + norms,
        "pke_fast, nothing run again": 2 * passes + few + norms,
        "hooks": 2 * passes + 10 * few + dense,
        "hooks, few logits": 2 * passes + few + dense,
    }


def test_a_step() -> None:
    assert step(ROUND, 8) == (2 * 200_000 + 20_000, 1_000_000 + 200_000 + 2 * 20_000 + 200_000)


def test_a_step_in_less_memory() -> None:
    assert kept(ROUND)["pke_fast, nothing run again"] == 54 + 40
    assert kept(ROUND)["dense masked Adam"] == 54 + 80
    ours, _ = step(ROUND, 8)
    assert step_in(ROUND, 8, 1.0) == ours
    assert step_in(ROUND, 8, 0.0) == ours + 200_000  # all of the window again
    assert step_in(ROUND, 8, 52 / 134) == pytest.approx(ours + 100_000)  # half of it: 10 and 94 numbers


@pytest.mark.parametrize("provider", ["pke_fast", "hooks"])
def test_what_is_kept_is_what_autograd_keeps(provider: str) -> None:
    """By the storages that graphs of two and of three layers hold, the weights' own left out."""
    tokens, held = 16, []
    for layers in (2, 3):
        torch.manual_seed(0)
        model = LlamaForCausalLM(_config(layers)).eval()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        graph: dict[int, Tensor] = {}

        def keep(tensor: Tensor, weights: set[int] = weights, graph: dict[int, Tensor] = graph) -> Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in weights:
                graph[place] = tensor  # and alive, so that no other takes its place
            return tensor

        with laid_out(model):
            subject = Subject(find_structure(model), random_sequences(8, 1, tokens), [], 0)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                cases.trace(provider, subject, tokens)
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in graph.values()) // 4)
    # what hooks hold themselves, h and its gradient, isn't autograd's
    by_hand = 2 * SMOLLM2.neurons if provider == "hooks" else 0
    name = "hooks" if provider == "hooks" else "pke_fast, nothing run again"
    assert (held[1] - held[0]) / tokens == kept(SMOLLM2)[name] - by_hand


def test_the_model_is_smollm2() -> None:
    layer = LlamaForCausalLM(_config(1)).model.layers[0]
    assert SMOLLM2.layer == sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert SMOLLM2.layers * SMOLLM2.layer == pytest.approx(106.2e6, rel=1e-3)


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
