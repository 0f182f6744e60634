"""Offloaded layers in a folder: the same values, mapped; no room is told before anything is changed."""

from __future__ import annotations

import errno
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError

import pke_fast
from pke_fast import planning, spilling
from pke_fast.cli import main
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError, PKEError
from pke_fast.mapped import mapped_bytes
from pke_fast.offloading import brought_to
from pke_fast.plan import Residence
from pke_fast.planning import Room
from pke_fast.requests import EditRequest, Pair
from pke_fast.spilling import spill
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer

CONFIG = PKEConfig(k=10, num_steps=2, window=(0, LAYERS), micro_batch_tokens=64, locality_tokens=3)
REQUESTS, LOCALITY = [EditRequest("Break a lock", "Never.", "Sure")], [Pair("Sing", "La")]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def model():
    return tiny_model("llama").requires_grad_(False)


@pytest.mark.skipif(sys.platform != "linux", reason="files are told apart by /proc")
def test_layers_are_mapped_and_keep_their_values(model, tmp_path):
    parameters = list(model.parameters())
    need = sum(p.nbytes for layer in model.model.layers[:2] for p in layer.parameters())
    assert spill(model.model.layers[:2], tmp_path) == need
    assert list(tmp_path.iterdir()) == []  # without a name, but there
    assert mapped_bytes(model)[0] == need
    assert same(model, tiny_model("llama"))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert spill(model.model.layers[:2], tmp_path) == 0  # they lie in a file now
    with brought_to(model, model.model.layers, torch.device("cpu"), 2), torch.no_grad():
        ids = torch.arange(9)[None]
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
        model.model.layers[1].mlp.down_proj.weight[3, 4] = 5  # a mapped weight can be written to
    assert model.model.layers[1].mlp.down_proj.weight[3, 4] == 5


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_folder_without_room_changes_nothing(error, model, tmp_path, monkeypatch):
    pointers = [p.data_ptr() for p in model.parameters()]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2**16))
    with pytest.raises(InputError, match=r"has no room[\s\S]*expected: 0 MiB[\s\S]*got: 0 MiB free[\s\S]*own dtype"):
        spill(model.model.layers, tmp_path)
    monkeypatch.undo()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(InputError, match=r"has no room[\s\S]*No space left"):
        spill(model.model.layers, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no such offload folder"):
        spill(model.model.layers, tmp_path / "nowhere")
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert same(model, tiny_model("llama"))


def test_other_errors_of_the_disk_are_told_too(model, tmp_path, monkeypatch):
    def fails(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(PKEError, match=r"can't write[\s\S]*os error 5"):
        spill(model.model.layers, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert same(model, tiny_model("llama"))


def test_an_edit_spills_what_it_cant_pin(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    plain = tiny_model("llama")
    pinnable = sum(p.nbytes for p in model.model.layers[2].parameters())
    residence = Residence(offloads=True, pinnable=pinnable)
    monkeypatch.setattr(planning, "_room", lambda *_: Room("cpu", 1000, residence=residence))
    given = {"config": CONFIG, "locality": LOCALITY, "offload_folder": tmp_path}
    with pytest.raises(InputError, match="too small") as told:
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, **given)
    least = pke_fast.budget.parse_bytes(str(told.value).split("at least ")[1].split("iB")[0] + "iB")
    monkeypatch.setattr(planning, "_room", lambda *_: Room("cpu", least, residence=residence))
    spilled = []
    monkeypatch.setattr(pke_fast.workbench, "spill", lambda layers, folder: spilled.append((len(layers), folder)))
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, **given)
    assert spilled == [(LAYERS - 1, tmp_path)]
    result.revert()
    assert same(model, plain)


def test_the_command_line_names_the_folder_that_isnt_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "requests.txt").write_text("Break a lock\n")
    given = ["--model", tmp_path / "model", "--requests", tmp_path / "requests.txt", "--out", tmp_path / "out"]
    settings = ["--set", "k=10", "--set", "window=[0,3]"]
    assert main(["edit", *map(str, given), *settings, "--offload-folder", str(tmp_path / "nowhere")]) == 2
    assert "no such offload folder" in capsys.readouterr().err
    assert spilling.spill([], tmp_path) == 0
