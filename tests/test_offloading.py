"""Offloaded layers: the same bits as a resident model, two layers on the device at most, all put back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors import safe_open

from pke_fast import offloading, ops, staging
from pke_fast.batches import make_batch
from pke_fast.columns import Columns
from pke_fast.config import PKEConfig
from pke_fast.editing import edit_columns
from pke_fast.errors import EditError, InputError
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.module_calls import hooks
from pke_fast.offloading import brought_to
from pke_fast.pace import Pace
from pke_fast.placement import live_weight
from pke_fast.scoring import score_batch
from pke_fast.structure import find_structure
from pke_fast.testing import LAYERS, tiny_model
from pke_fast.trainer import Trainer

CPU = torch.device("cpu")
FAMILIES = ("llama", "gpt2", "phi3")
CONFIG = PKEConfig(k=6, num_steps=3, batch_size=4, lr=1e-3, micro_batch_tokens=40)


class Stage:
    def __call__(self, *_):
        return self

    def __enter__(self):
        return lambda _n: None

    def __exit__(self, *_):
        return None


def frozen(family, dtype="fp32"):
    return tiny_model(family, dtype=dtype).requires_grad_(False)


def edited(structure, sequences, hot=(0, 1), kept=None):
    made = sequences(8)
    hot_spots = {layer: torch.tensor([1, 7, 30]) for layer in hot}
    pace = Pace(40, None, kept)
    return edit_columns(structure, hot_spots, made[:5], made[5:], CONFIG, pad_id=259, stage=Stage(), pace=pace)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("lowest", "pinned"), [(1, 1), (2, 0), (3, 1), (3, 3)])
def test_offloaded_layers_give_the_same_bits(family, dtype, lowest, pinned, sequences):
    plain, model = frozen(family, dtype), frozen(family, dtype)
    resident, structure = find_structure(plain), find_structure(model)
    batch = make_batch(sequences(6), range(6), 259)
    with brought_to(model, structure.layers, CPU, lowest, pinned):
        most = LAYERS - lowest  # layers that keep their graph: to keep it or to make it again isn't the same to the bit
        for kept in (None, 0, 1):
            wanted = score_batch(resident, batch, torch.ones(6), 0, most if kept is None else min(kept, most))
            assert torch.equal(score_batch(structure, batch, torch.ones(6), 0, kept), wanted)
        ids = torch.arange(10)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)
        wanted, found = edited(resident, sequences, kept=most), edited(structure, sequences)
        assert (found.steps, found.before, found.after) == (wanted.steps, wanted.before, wanted.after)
        assert found.steps[-1].loss < found.steps[0].loss
        for ours, theirs in zip(found.layers, wanted.layers, strict=True):
            assert all(torch.equal(getattr(ours, part), getattr(theirs, part)) for part in ("neurons", "old", "new"))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)  # what was staged before isn't used again
    assert same_weights(model, plain)  # written back


def test_the_model_is_as_before_with_its_own_parameters(sequences):
    model = tiny_model("llama").requires_grad_(True)
    before = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    attributes = [set(vars(module)) for module in model.modules()]
    structure = find_structure(model)
    with brought_to(model, structure.layers, CPU, 2, 1):
        inside = dict(model.named_parameters())
        assert list(inside) == list(before)
        assert inside["model.layers.1.mlp.up_proj.weight"] is not before["model.layers.1.mlp.up_proj.weight"][0]
        assert inside["model.layers.0.mlp.up_proj.weight"] is before["model.layers.0.mlp.up_proj.weight"][0]
        weight = live_weight(model, "model.layers.1.mlp.down_proj.weight")
        assert weight is inside["model.layers.1.mlp.down_proj.weight"]
    assert {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert same_weights(model, tiny_model("llama"))


def test_at_most_two_layers_are_staged_and_they_come_ahead(sequences, monkeypatch):
    model = frozen("llama")
    structure = find_structure(model)
    size = staging.StagedLayer.of(structure.layers[0]).size
    assert size >= sum(p.nbytes for p in structure.layers[0].parameters())
    order, copies = [], []
    own = staging.Staging
    use, copy = own.use, own._copy
    monkeypatch.setattr(own, "use", lambda self, i: (order.append(i), use(self, i), copies.append(self.copies))[1])
    monkeypatch.setattr(own, "_copy", lambda self, i, *more: (order.append(-1 - i), copy(self, i, *more))[1])
    batch = make_batch(sequences(4), range(4), 259)
    with brought_to(model, structure.layers, CPU, LAYERS) as slots_of:
        assert [slot.numel() for slot in slots_of._slots] == [size, size]
        pointers = {slot.data_ptr() for slot in slots_of._slots}
        seen = set()

        def look(module, _args):
            seen.add(module.weight.untyped_storage().data_ptr())

        for mlp in structure.mlps:
            mlp.up.register_forward_pre_hook(look)
        score_batch(structure, batch, torch.ones(4), 0, None)
        assert seen == pointers
        # recording passes over all layers; up 0 1 2, back 2 1 0: 2 and 1 are still there
        assert [i for i in order if i >= 0] == [0, 1, 2, 2, 1, 0]
        assert sorted(-1 - i for i in order if i < 0) == [0, 0, 1, 2]
        assert copies == [2, 3, 3, 3, 4, 4]  # each is copied while the one before it is in use, on the way back too
        slots = [weakref.ref(slot) for slot in slots_of._slots]
        worker = slots_of._worker
    for mlp in structure.mlps:
        mlp.up._forward_pre_hooks.clear()
    gc.collect()
    assert all(slot() is None for slot in slots)
    assert worker._shutdown


def test_a_graph_that_outlives_its_weights_is_noticed():
    model = frozen("llama")
    structure = find_structure(model)
    with brought_to(model, structure.layers, CPU, LAYERS):
        hidden = torch.ones(1, 3, 32, requires_grad=True)
        mlp = structure.mlps[0].module
        structure.layers[0]._pke_fast_brought.use(0)
        out = mlp(hidden)
        with torch.no_grad():
            model(torch.arange(5)[None])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("lowest", [1, 3])
def test_an_exception_puts_all_back(lowest, sequences, monkeypatch):
    model = frozen("llama")
    structure = find_structure(model)

    def fails(self, number, **_):
        self.gradients(number)
        self.update(number)
        raise EditError("no")

    monkeypatch.setattr(Trainer, "step", fails)
    with pytest.raises(EditError), brought_to(model, structure.layers, CPU, lowest, 1):
        edited(structure, sequences)
    assert same_weights(model, tiny_model("llama"))
    assert not any("_pke_fast_brought" in vars(layer) or "forward" in vars(layer) for layer in structure.layers)


def test_an_exception_within_a_layer_leaves_its_weights_at_home(monkeypatch):
    model = frozen("llama")
    structure = find_structure(model)
    with brought_to(model, structure.layers, CPU, 2, 2):
        home = live_weight(model, "model.layers.1.mlp.down_proj.weight")

        def fails(*_args, **_kwargs):
            raise KeyError("within")

        monkeypatch.setattr(structure.layers[1].self_attn, "forward", fails)
        with pytest.raises(KeyError), torch.no_grad():
            model(torch.arange(5)[None])
        assert live_weight(model, "model.layers.1.mlp.down_proj.weight") is home
        monkeypatch.undo()
        with torch.no_grad():
            assert torch.equal(model(torch.arange(5)[None]).logits, frozen("llama")(torch.arange(5)[None]).logits)


def test_a_failing_copy_is_told_where_the_layer_is_used(monkeypatch):
    model = frozen("llama")
    structure = find_structure(model)

    def fails(self, flat):
        raise OSError("the file is gone")

    monkeypatch.setattr(staging.StagedLayer, "copy_into", fails)
    with pytest.raises(OSError, match="file is gone"), brought_to(model, structure.layers, CPU, 2), torch.no_grad():
        model(torch.arange(5)[None])
    assert same_weights(model, tiny_model("llama"))


def test_a_layer_whose_copy_failed_is_brought_again(monkeypatch):
    """As where memory ran out and the work is tried once more: what the slot holds isn't the layer's."""
    model, ids = frozen("llama"), torch.arange(5)[None]
    structure = find_structure(model)
    copy, failed = staging.StagedLayer.copy_into, []

    def fails_once(self, flat):
        if not failed:
            failed.append(self)
            raise MemoryError
        copy(self, flat)

    monkeypatch.setattr(staging.StagedLayer, "copy_into", fails_once)
    with brought_to(model, structure.layers, CPU, 2), torch.no_grad():
        with pytest.raises(MemoryError):
            model(ids)
        assert torch.equal(model(ids).logits, frozen("llama")(ids).logits)


def test_weights_in_a_file_stay_there_and_the_file_as_it_is(tmp_path, sequences):
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    structure = find_structure(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with brought_to(model, structure.layers, CPU, LAYERS):
        outcome = edited(structure, sequences, hot=(0, 2))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for part in outcome.layers:
        assert torch.equal(read_columns(model.get_parameter(part.weight), part.axis, part.index), part.new)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert torch.equal(read_columns(file.get_tensor(part.weight), part.axis, part.index), part.old)


def test_everything_else_moves_to_another_device():
    """A second device is played by meta."""
    model = frozen("gpt2")
    tied = model.transformer.wte.weight
    assert model.lm_head.weight is tied
    copies = offloading._Copies(torch.device("meta"))
    own = dict(model.lm_head._parameters)
    copies.take(model.lm_head, weights=True)
    copies.take(model.transformer.wte, weights=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.is_meta
    assert len(copies._made) == 1
    offloading._put_back(model.lm_head, own, {})
    assert model.lm_head.weight is tied


def test_what_is_written_to_a_copy_comes_back_and_nothing_else():
    own, other = (torch.nn.Parameter(torch.arange(4.0), requires_grad=False) for _ in range(2))
    copies = offloading._Copies(CPU)
    copy, untouched = (staging.frozen(p.clone()) for p in (own, other))
    copies._keep(own, copy)
    copies._keep(other, untouched)
    copy[1] = -0.0
    own_version, other_version = own._version, other._version
    copies.write_back()
    assert own.tolist() == [0, 0, 2, 3]
    assert torch.signbit(own[1])
    assert own._version == own_version + 1
    assert other._version == other_version


def test_what_a_form_writes_in_raw_memory_comes_back_too(monkeypatch):
    """As Triton's forms do on a card: torch itself doesn't see that they write."""
    own = torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    copies = offloading._Copies(CPU)
    copy = staging.frozen(own.clone())
    copies._keep(own, copy)

    def write(weight, axis, neurons, values):
        weight.numpy()[neurons.numpy()] = values.numpy()

    monkeypatch.setattr(ops, "implementation", lambda *_: write)
    torch.ops.pke_fast.write_columns(copy.detach(), 0, torch.tensor([1]), torch.ones(1, 2))
    copies.write_back()
    assert own.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_a_spread_model_isnt_offloaded_besides(tmp_path):
    from accelerate import cpu_offload

    model = cpu_offload(frozen("llama"), "cpu")
    with pytest.raises(InputError, match="spread already"), brought_to(model, model.model.layers, CPU, 1):
        pass


def test_no_memory_to_pin_is_told(monkeypatch):
    def fails(self, device):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(staging.StagedLayer, "pin", fails)
    model = frozen("llama")
    message = r"no memory to pin[\s\S]*MiB[\s\S]*out of memory"
    with pytest.raises(InputError, match=message), brought_to(model, model.model.layers, CPU, 2, 1):
        pass
    assert same_weights(model, tiny_model("llama"))


def test_columns_of_an_offloaded_layer_live_with_its_weight():
    model = frozen("llama")
    structure = find_structure(model)
    with brought_to(model, structure.layers, CPU, 2, 2):
        columns = Columns(structure, 1, torch.arange(3))
        assert columns.weight.data_ptr() == structure.layers[1].mlp.down_proj.weight.data_ptr()
        assert structure.lowest_kept == 2
        assert structure.device_of(1) == CPU
    assert structure.lowest_kept == 0


class Streams:
    """What stands in for CUDA's streams and events: they note their order, and a copy is made at once."""

    def __init__(self, monkeypatch):
        self.log = log = []

        class Event:
            def record(self, stream):
                self.at = len(log)
                log.append(("record", stream.name))

            def synchronize(self):
                log.append(("synchronize", self.at))

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_event(self, event):
                log.append((f"{self.name} waits", event.at))

        self.computing, self.copying = Stream("computing"), Stream("copying")
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: self.computing)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.entered(stream))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: log.append(("all", None)))
        monkeypatch.setattr(staging, "buffer", lambda size, pinned: torch.empty(size, dtype=torch.uint8))

    def entered(self, stream):
        self.log.append(("on", stream.name))
        return hooks()


@pytest.mark.parametrize("pinned", [0, LAYERS])
def test_streams_wait_for_each_other(pinned, monkeypatch, sequences):
    """Of CUDA's ways what can be run without one: a copy waits for the slot's last use, and its use for the copy."""
    streams = Streams(monkeypatch)
    plain, model = frozen("llama"), frozen("llama")
    structure = find_structure(model)
    made = staging.Staging
    monkeypatch.setattr(offloading, "Staging", lambda layers, device, _none: made(layers, device, streams.copying))
    batch = make_batch(sequences(4), range(4), 259)
    with brought_to(model, structure.layers, CPU, LAYERS, pinned) as slots:
        found = score_batch(structure, batch, torch.ones(4), 0, 0)
        copies = slots.copies
    assert torch.equal(found, score_batch(find_structure(plain), batch, torch.ones(4), 0, 0))
    log = streams.log
    free = [i for i, entry in enumerate(log) if entry == ("record", "computing")]
    done = [i for i, entry in enumerate(log) if entry == ("record", "copying")]
    assert len(free) == len(done) == copies == 4
    assert [at for what, at in log if what == "copying waits"] == free
    assert [at for what, at in log if what == "computing waits"] == done
    for a, b in zip(free, done, strict=True):
        assert a < log.index(("copying waits", a)) < b < log.index(("computing waits", b))
    assert [at for what, at in log if what == "synchronize"] == ([] if pinned else done[:-1])  # one bounce buffer
    assert log[-1] == ("all", None)
