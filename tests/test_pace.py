"""Memory that runs out: the micro-batch is halved, the user is told, and the result is that of a slower run."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import pke_fast
from pke_fast import dinm, locating, probe, scoring, trainer
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.memory import is_out_of_memory
from pke_fast.pace import Pace
from pke_fast.preparation import Job
from pke_fast.requests import EditRequest, Pair
from pke_fast.tape import Tape
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer
from pke_fast.trainer import Trainer
from pke_fast.workbench import workbench

# torch's own words, c10/core/impl/alloc_cpu.cpp
TEXT = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "137438953472 bytes. Error code 12 (Cannot allocate memory)"
)
CONFIG = PKEConfig(
    k=10, num_steps=3, batch_size=6, locality_batch_size=4, window=(1, LAYERS), locality_tokens=3, lr=1e-2
)
REQUESTS = [EditRequest(f"Break the lock {n} of it", "Never do that.", "Sure") for n in range(9)]
LOCALITY = [Pair(f"Bake cake {n}", "Take some flour") for n in range(5)]


class Memory:
    """Room for so many tokens at once: an op on more raises as torch does. Counts what it refused."""

    def __init__(self, tokens, error=None):
        self.tokens, self.refused = tokens, []
        self.error = error or (lambda: RuntimeError(TEXT))

    def takes(self, batch, doing):
        if isinstance(batch.input_ids, FakeTensor):
            return  # a rehearsal takes no memory
        if batch.input_ids.numel() > self.tokens and len(batch.rows) > 1:
            self.refused.append((doing, batch.input_ids.numel()))
            raise self.error()


def patched(monkeypatch, memory, place):
    """Runs out at the place: on the way up or back of a pass, while recording, or while measuring."""
    if place == "recording":
        for module in (scoring, trainer):
            own = module.record

            def record(structure, batch, *where, own=own, **more):
                memory.takes(batch, place)
                return own(structure, batch, *where, **more)

            monkeypatch.setattr(module, "record", record)
        return
    own = Tape.there_and_back if place != "measuring" else Tape.run

    def up(self, loss_of, *args, **kwargs):
        def on_top(hidden):
            memory.takes(self.batch, place)
            return loss_of(hidden)

        return own(self, on_top, *args, **kwargs)

    def back(self, loss_of, *args, **kwargs):
        def on_top(hidden):
            loss = loss_of(hidden)
            loss.register_hook(lambda _grad: None)
            hidden.register_hook(lambda _grad: memory.takes(self.batch, place))  # half of the way has been added up
            return loss

        return own(self, on_top, *args, **kwargs)

    def run(self):
        memory.takes(self.batch, place)
        return own(self)

    if place == "measuring":
        monkeypatch.setattr(Tape, "run", run)
    else:
        monkeypatch.setattr(Tape, "there_and_back", {"up": up, "back": back}[place])


def edited(tokens, **more):
    model = tiny_model("llama")
    config = CONFIG.replace(micro_batch_tokens=tokens)
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, samples=0, **more)
    return model, result


def changes(patch):
    return {part.layer: (part.neurons, (part.new - part.old)) for part in patch.layers}


@pytest.fixture(scope="module")
def slow():
    """The run that has the small micro-batch from the start."""
    return edited(128)[1]


@pytest.mark.parametrize("place", ["up", "back", "recording", "measuring"])
def test_running_out_halves_the_micro_batch_and_gives_the_same_edit(place, slow, monkeypatch, caplog):
    memory = Memory(128)
    patched(monkeypatch, memory, place)
    with caplog.at_level(logging.WARNING, "pke_fast"):
        _, result = edited(512)
    assert [tokens for _, tokens in memory.refused if tokens > 256]
    notes = result.report["plan"]["notes"]
    assert [note.rpartition(": ")[2] for note in notes] == [f"went on with {n} tokens at once" for n in (256, 128)]
    assert all(note in caplog.messages and note in result.report["warnings"] for note in notes)
    ours, theirs = changes(result.patch), changes(slow.patch)
    assert ours.keys() == theirs.keys()
    for layer, (neurons, change) in ours.items():
        assert torch.equal(neurons, theirs[layer][0])
        assert float((change - theirs[layer][1]).norm() / theirs[layer][1].norm()) < 1e-3
    steps = [[step["loss"] for step in report["losses"]["steps"]] for report in (result.report, slow.report)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)
    assert result.report["losses"]["after"]["edit"] == pytest.approx(slow.report["losses"]["after"]["edit"], rel=1e-4)


def slower_from_step_2(result, slow):
    """It was halved twice there, and the edit is that of a run that was slow from the start."""
    said = "memory ran out while making step 2: went on with {} tokens at once"
    assert result.report["plan"]["notes"] == [said.format(256), said.format(128)]
    for layer, (_, change) in changes(result.patch).items():
        wanted = changes(slow.patch)[layer][1]
        assert float((change - wanted).norm() / wanted.norm()) < 1e-3


def test_what_runs_out_in_a_step_alone_is_told_by_its_step(slow, monkeypatch):
    """A step that is half made begins anew: its gradients aren't counted twice."""
    memory = Memory(10_000)
    patched(monkeypatch, memory, "back")
    own = Trainer.step

    def step(self, number, **kwargs):
        memory.tokens = 128 if number == 1 else 10_000
        return own(self, number, **kwargs)

    monkeypatch.setattr(Trainer, "step", step)
    slower_from_step_2(edited(512)[1], slow)


def test_what_is_recorded_anew_may_not_fit_either(slow, monkeypatch):
    memory = Memory(10_000)
    patched(monkeypatch, memory, "recording")
    own, failed = Trainer.gradients, []

    def gradients(self, number, **kwargs):
        if number == 1 and not failed:
            failed.append(number)
            memory.tokens = 128
            raise MemoryError
        return own(self, number, **kwargs)

    monkeypatch.setattr(Trainer, "gradients", gradients)
    slower_from_step_2(edited(512)[1], slow)


@pytest.mark.parametrize("place", ["up", "measuring", "recording"])
def test_one_request_that_is_too_long_is_told_at_once(place, monkeypatch, caplog):
    """It would be no shorter with fewer tokens at once."""
    memory = Memory(10_000)
    monkeypatch.setattr(Memory, "takes", lambda self, batch, doing: takes(batch))
    refused = []

    def takes(batch):
        if not isinstance(batch.input_ids, FakeTensor) and batch.input_ids.shape[1] > 400:
            refused.append(batch.input_ids.numel())
            raise MemoryError

    patched(monkeypatch, memory, place)
    requests = [*REQUESTS, EditRequest("Break it " + "now " * 120, "Never do that.", "Sure")]
    config = CONFIG.replace(micro_batch_tokens=512)
    with pytest.raises(InputError, match="a single request") as told:
        pke_fast.edit(tiny_model("llama"), tiny_tokenizer(), requests, config, locality=LOCALITY, samples=0)
    assert len(refused) == 1
    assert f"{refused[0]} tokens" in str(told.value)
    assert "went on with" not in caplog.text


@pytest.mark.parametrize("method", ["dinm", "probe"])
def test_running_out_beside_scoring_and_editing(method, monkeypatch):
    """Answers that are compared, and the probe: as with the small micro-batch, and no request is counted twice."""
    whole, short, refused, advanced = (dinm.answer_distances, probe.last_states), [], [], []

    def failing(own, name):
        def work(*args, advance, **kwargs):
            made = own(*args, advance=advance, **kwargs)
            if short and kwargs[name] > 64:
                refused.append(kwargs[name])
                raise MemoryError
            return made

        return work

    monkeypatch.setattr(dinm, "answer_distances", failing(whole[0], "micro_batch_tokens"))
    monkeypatch.setattr(probe, "last_states", failing(whole[1], "tokens"))
    config = CONFIG.replace(method="dinm" if method == "dinm" else "pke", micro_batch_tokens=128)
    with workbench(tiny_model("llama"), tiny_tokenizer(), config) as bench:
        found = []
        for _ in range(2):
            bench = bench.going(Pace(128), bench.resume)
            if method == "dinm":
                job = Job(tuple(REQUESTS), len(REQUESTS), 0, tuple(LOCALITY), "given")
                found.append(locating.locate_hot_spots(bench, job).layer_path)
            else:
                prompts = [request.prompt for request in REQUESTS]
                states = probe.states_of(bench, prompts, [1], advanced.append if short else lambda _n: None)
                found.append(states[1])
            short.append(True)
        assert refused == [128]
        assert bench.pace.tokens == 64
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert method == "dinm" or sum(advanced) == len(REQUESTS)


@pytest.mark.parametrize("place", ["up", "measuring", "recording"])
def test_too_little_for_the_least_is_bad_input_and_changes_nothing(place, monkeypatch):
    patched(monkeypatch, Memory(0), place)
    model = tiny_model("llama")
    config = CONFIG.replace(micro_batch_tokens=512)
    short = [EditRequest("Rob", "No.", "Ok") for _ in range(6)]  # many to a micro-batch even at the least
    with pytest.raises(InputError, match="memory ran out while .* with 64 tokens"):
        pke_fast.edit(model, tiny_tokenizer(False), short, config, locality=[Pair("Eat", "Yes")] * 6, samples=0)
    for ours, own in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(ours, own)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("place", ["up", "back", "recording", "measuring"])
def test_another_error_passes_through(place, monkeypatch):
    patched(monkeypatch, Memory(128, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")), place)
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, samples=0)
    for ours, own in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(ours, own)


def test_what_says_that_memory_ran_out():
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(told.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    for words in ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory"):
        assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(ValueError(TEXT))


def test_halving_ends_at_the_least():
    pace = Pace(300)
    pace.halve("working")
    pace.halve("working")
    assert pace.tokens == 75
    with pytest.raises(InputError, match="75 tokens in flight"):
        pace.halve("working")
    assert (pace.tokens, len(pace.notes)) == (75, 2)
