"""On a GPU that is pretended: whole jobs come to what they come to on the CPU, no tensor of the host meets one of the
card's, and an edit step waits for the card once."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

pytest.importorskip("triton.runtime.interpreter")
if torch.cuda.is_available():
    pytest.skip("there is a real one", allow_module_level=True)

from pretended_gpu import pretended_gpu

import pke_fast
from pke_fast import detectors, ops
from pke_fast.config import PKEConfig
from pke_fast.placement import device_of
from pke_fast.requests import EditRequest, Pair
from pke_fast.structure import find_structure
from pke_fast.testing import FAMILIES, tiny_model, tiny_tokenizer
from pke_fast.trainer import Trainer

# As many on either side as detectors need.
REQUESTS = [EditRequest(f"Break lock {i}", "No.", "Sure") for i in range(16)]
LOCALITY = [Pair(f"Bake cake {i}", "Take flour") for i in range(16)]
CONFIG = PKEConfig(
    k=12,
    num_steps=2,
    batch_size=4,
    locality_batch_size=4,
    window=(0.4, 1.0),
    backend="reference",
    micro_batch_tokens=96,
)


@pytest.fixture
def edit(tmp_path, monkeypatch):
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(detectors.SOLVER, "max_iter", 20)
    return partial(pke_fast.edit, tokenizer=tiny_tokenizer(), locality=LOCALITY, samples=0)


def same(ours, theirs):
    pairs = list(zip(ours.patch.layers, theirs.patch.layers, strict=True))
    assert pairs
    for one, other in pairs:
        assert (one.weight, one.index.tolist()) == (other.weight, other.index.tolist())
        assert torch.equal(one.new, other.new)


def test_it_refuses_what_a_card_refuses():
    with pretended_gpu() as waits:
        card, host = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
        assert (card.device.type, card.new_zeros(1).device.type, torch.empty_like(card).device.type) == ("cuda",) * 3
        for meeting in (
            lambda: card + host,
            lambda: torch.stack([host, card]),
            lambda: card.index_select(0, torch.tensor([0])),
            lambda: host.index_select(0, torch.tensor([0], device="cuda")),
            lambda: torch.nn.functional.linear(card, host),
            lambda: torch.ops.pke_fast.write_columns(card, 0, torch.tensor([0]), card[:1]),
        ):
            with pytest.raises((RuntimeError, pke_fast.InputError), match="same device|on cuda:0"):
                meeting()
        with pytest.raises(TypeError, match="numpy"):
            card.numpy()
        waits.clear()
        assert torch.equal((card + host.to("cuda:0") * 2.0).cpu(), torch.full((3, 2), 3.0))
        assert (float(card.sum()), card[card > 0].tolist()) == (6.0, [1.0] * 6)
        assert [wait.split(":")[0] for wait in waits] == [
            "a tensor is copied from one to the other",
            "a tensor is copied from one to the other",
            "a number is read",
            "a size depends on values",
            "numbers are read",
        ]


def test_gradients_come_back_over_both_devices():
    x = torch.ones(1, 2, requires_grad=True)
    with pretended_gpu():
        layer = torch.nn.Linear(2, 2, bias=False).to("cuda")
        (layer(x.to("cuda")).cpu() ** 2).sum().backward()
        assert layer.weight.grad.device.type == "cuda"
    assert type(x.grad) is torch.Tensor


@pytest.mark.parametrize(
    "family", [f if f in ("llama", "gpt2") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_an_edit_is_the_same_on_the_card(edit, family):
    ours = edit(tiny_model(family), requests=REQUESTS, config=CONFIG)
    assert ours.report["losses"]["gain"]
    with pretended_gpu():
        model = tiny_model(family).to("cuda")
        theirs = edit(model, requests=REQUESTS, config=CONFIG)
        same(ours, theirs)
        theirs.revert()
        assert {device_of(layer).type for layer in find_structure(model).layers} == {"cuda"}
        for now, before in zip(model.parameters(), tiny_model(family).parameters(), strict=True):
            assert torch.equal(now.cpu(), before)


@pytest.mark.parametrize("method", ["dinm", "dinm-parity"])
def test_the_published_method_is_the_same_on_the_card(edit, method):
    config = PKEConfig.preset(method).replace(num_steps=2, backend="reference", micro_batch_tokens=96)
    ours = edit(tiny_model("llama"), requests=REQUESTS[:3], config=config)
    with pretended_gpu():
        same(ours, edit(tiny_model("llama").to("cuda"), requests=REQUESTS[:3], config=config))


def test_triton_kernels_do_the_whole_job(edit, monkeypatch):
    chosen, ran = ops.chosen_backend, {}

    def recorded(op, *args):
        ran[op] = chosen(op, *args)
        return ran[op]

    config = CONFIG.replace(backend="auto", num_steps=1, batch_size=1, locality_batch_size=1, prompt_tokens=0)
    some = {"requests": REQUESTS[:2], "locality": LOCALITY[:2], "config": config}
    ours = edit(tiny_model("llama"), **some)
    monkeypatch.setattr(ops, "chosen_backend", recorded)
    with pretended_gpu():
        theirs = edit(tiny_model("llama").to("cuda"), **some)
    assert {op for op, backend in ran.items() if backend != "triton"} == {"select_hotspots"}
    for one, other in zip(ours.patch.layers, theirs.patch.layers, strict=True):
        assert one.index.tolist() == other.index.tolist()
        torch.testing.assert_close(other.new, one.new, rtol=1e-3, atol=1e-5)


def test_a_step_waits_for_the_card_once(edit, monkeypatch):
    waited, step = [], Trainer.step

    def watched(self, number):
        before = len(waits)
        done = step(self, number)
        waited.append(waits[before:])
        return done

    monkeypatch.setattr(Trainer, "step", watched)
    with pretended_gpu() as waits:
        edit(tiny_model("llama").to("cuda"), requests=REQUESTS, config=CONFIG.replace(num_steps=3))
    assert [len(each) for each in waited] == [1, 1, 1]
    assert "numbers are read: trainer.py" in waited[0][0]


def test_a_model_in_the_hosts_memory_is_brought(edit):
    """All of it, and with layers that stay with the host."""
    ours = edit(tiny_model("llama"), requests=REQUESTS, config=CONFIG)
    with pretended_gpu():
        model = tiny_model("llama")
        there = edit(model, requests=REQUESTS, config=CONFIG, device="cuda:0")
        same(ours, there)
        there.revert()
        less = int(0.8 * there.report["plan"]["bytes"]["peak"])
        partly = edit(model, requests=REQUESTS, config=CONFIG, device="cuda:0", memory_budget=less)
        assert partly.report["plan"]["layers offloaded"]["pinned"]
        same(ours, partly)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_answers_are_the_same_on_the_card():
    prompts = ["Break a lock", "Steal a car"], ["Bake a cake"], "Plain text, to be read."
    ours = pke_fast.evaluate(tiny_model("llama"), tiny_tokenizer(), *prompts, max_new_tokens=8)
    with pretended_gpu():
        theirs = pke_fast.evaluate(tiny_model("llama").to("cuda"), tiny_tokenizer(), *prompts, max_new_tokens=8)
    assert theirs.generations == ours.generations
    assert theirs.text == ours.text


@pytest.mark.slow
@pytest.mark.parametrize("script", ["targets", "offload"])
def test_the_gpu_benchmarks_run(tmp_path, monkeypatch, script):
    module = pytest.importorskip(script)
    monkeypatch.setenv("PKE_FAST_BACKEND", "reference")
    more = {"targets": ["--rounds", "1"], "offload": ["--without", "accelerate"]}[script]
    monkeypatch.setattr(sys, "argv", [script, "--tiny", *more, "--out", str(tmp_path / "figures.csv")])
    with pretended_gpu():
        assert module.main() == 0
    assert "cuda" in (tmp_path / "figures.csv").read_text()
