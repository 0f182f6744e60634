"""Padding changes nothing in half precision, in whatever kernel attention runs: a GPU has others than a CPU."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pke_fast
from pke_fast.modes import evaluating

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = 97
CLOSE = 0.05  # relative, Frobenius: some roundings of bf16


def model_of(head_dim: int, device: str) -> LlamaForCausalLM:
    sizes = {"hidden_size": 4 * head_dim, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": TOKENS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    return model.to(device, torch.bfloat16).eval()


def ids(length: int) -> list[int]:
    return random.Random(length).choices(range(TOKENS), k=length)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("widest", [64, 128, 192])
def test_scores_of_padded_rows_are_those_of_rows_alone(widest: int, head_dim: int, device: str) -> None:
    model = model_of(head_dim, device)
    sequences = [(ids(length)[:-8], ids(length)[-8:]) for length in (widest, widest - 3, widest // 2)]
    together = pke_fast.trace(model, sequences, micro_batch_tokens=10_000)
    alone = pke_fast.trace(model, sequences, micro_batch_tokens=1)
    for ours, theirs in (
        (together.weight_change, alone.weight_change),
        (together.activation_path, alone.activation_path),
    ):
        assert ours.isfinite().all()
        assert float((ours - theirs).norm() / theirs.norm()) < CLOSE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_padded_on_the_left_go_on_as_they_do_alone(head_dim: int, device: str) -> None:
    model, lengths = model_of(head_dim, device), (64, 61, 5)
    padded = torch.tensor([[0] * (64 - length) + ids(length) for length in lengths], device=device)
    mask = torch.tensor([[0] * (64 - length) + [1] * length for length in lengths], device=device)
    with evaluating(model):
        together = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, length in enumerate(lengths):
            alone = model(input_ids=torch.tensor([ids(length)], device=device)).logits[0, -1].float()
            ours = together[row, -1].float()
            assert ours.isfinite().all()
            assert float((ours - alone).norm() / alone.norm()) < CLOSE


def test_attention_is_never_cudnns_while_a_model_is_worked_with() -> None:
    asked = torch.backends.cuda.cudnn_sdp_enabled
    before = asked()
    with evaluating(model_of(64, "cpu")):
        assert not asked()
    assert asked() == before
