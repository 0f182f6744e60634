"""Patches on disk: exact to the bit, the source untouched, nothing left behind, other checkpoints refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron_patches import DOWN, PLACES, all_of, part_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pke_fast import checkpoint, stored
from pke_fast.checkpoint import patch_checkpoint
from pke_fast.errors import InputError, PatchError, PKEError
from pke_fast.patch import LayerPatch, Patch
from pke_fast.testing import tiny_model


def make_patch(model: nn.Module, family: str = "llama", kinds: tuple[str, ...] = DOWN) -> Patch:
    def change(old: Tensor) -> Tensor:
        new = old * 1.5 + 0.25
        new[0, 0], new[1, 1] = -0.0, float("nan")
        return new

    parts = [part_of(model, family, kind, layer, [0, 7, 8, 47], change) for layer in (1, 2) for kind in kinds]
    return Patch(tuple(parts), {"base": {"name": "tiny"}})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    return found


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Patch]:
    """A sharded bf16 Llama with a few other files, and a patch of it."""
    model = tiny_model("llama", dtype="bf16")
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="15KB")
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "notes.txt").write_text("notes")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    return source, make_patch(model)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("shard", "band"), [("15KB", 200), ("1GB", stored.BAND)])
def test_apply_and_revert_are_exact(
    family: str, dtype: str, shard: str, band: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BAND", band)  # 200 bytes: one or two rows
    model = tiny_model(family, dtype=dtype)
    source, patched, back = tmp_path / "source", tmp_path / "patched", tmp_path / "back"
    model.save_pretrained(source, max_shard_size=shard)
    assert (source / "model.safetensors").exists() == (shard == "1GB")
    before = snapshot(source)
    patch = make_patch(model, family, all_of(family))
    done = patch_checkpoint(source, patch, patched)
    assert snapshot(source) == before
    assert sorted([name for names in done["rewritten"].values() for name in names]) == sorted(
        {part.weight for part in patch.layers}
    )
    assert done["neurons"] == 8
    expected = tensors(source)
    for part in patch.layers:
        for row, neuron in enumerate(part.neurons.tolist()):
            _, axis, offset = PLACES[family][part.projection]
            expected[part.weight].select(axis, neuron + offset).copy_(part.new[row])
    written = tensors(patched)
    assert {key: raw(value) for key, value in written.items()} == {key: raw(value) for key, value in expected.items()}
    patch.apply(model)  # in memory and on disk: the same
    assert all(raw(model.get_parameter(part.weight)) == raw(written[part.weight]) for part in patch.layers)
    done = patch_checkpoint(patched, patch, back, revert=True)
    assert done["reverted"]
    assert snapshot(back) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "patched", "source"]


def test_patched_checkpoint_loads_in_transformers(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, patch = saved
    patch_checkpoint(source, patch, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    patch.revert(model)  # refuses anything but the new values
    original = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
    other = dict(original.named_parameters())
    assert all(raw(value) == raw(other[name]) for name, value in model.named_parameters())


def test_untouched_shards_are_linked_and_touched_ones_are_not(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    done = patch_checkpoint(source, patch, tmp_path / "out")
    shards = {path.name for path in source.glob("*.safetensors")}
    touched = set(done["rewritten"])
    assert touched
    assert touched < shards
    for name in shards:
        shared = os.path.samefile(source / name, tmp_path / "out" / name)
        assert shared == (name not in touched)
    assert set(done["linked"]) == shards - touched
    assert "config.json" in done["copied"]  # small files are edited by hand: a link would change the source
    assert not os.path.samefile(source / "config.json", tmp_path / "out" / "config.json")
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "notes"
    assert not (tmp_path / "out" / ".cache").exists()
    assert done["other_weights"] == []


def test_without_links_files_are_copied(
    saved: tuple[Path, Patch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    source, patch = saved
    monkeypatch.setattr(checkpoint.os, "link", no_links)
    done = patch_checkpoint(source, patch, tmp_path / "out")
    assert done["linked"] == []
    monkeypatch.undo()
    patch_checkpoint(tmp_path / "out", patch, tmp_path / "back", revert=True)
    hidden = {".cache/x"}
    assert snapshot(tmp_path / "back") == {name: data for name, data in snapshot(source).items() if name not in hidden}


def test_a_hub_cache_of_links_to_blobs(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    hub = tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshot").mkdir()
    for index, path in enumerate(sorted(path for path in source.iterdir() if path.is_file())):
        shutil.copyfile(path, hub / "blobs" / str(index))
        (hub / "blobs" / str(index)).chmod(0o444)
        (hub / "snapshot" / path.name).symlink_to(f"../blobs/{index}")
    before = snapshot(hub)
    patch_checkpoint(hub / "snapshot", patch, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    patch_checkpoint(tmp_path / "out", patch, tmp_path / "back", revert=True)
    assert snapshot(tmp_path / "back") == snapshot(hub / "snapshot")
    assert snapshot(hub) == before


@pytest.mark.parametrize(("family", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_names_may_lack_or_have_a_prefix(family: str, prefix: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype="bf16")
    patch = make_patch(model, family)
    model.base_model.save_pretrained(tmp_path / "bare")
    assert all(not name.startswith(prefix) for name in tensors(tmp_path / "bare"))
    done = patch_checkpoint(tmp_path / "bare", patch, tmp_path / "out")
    assert [name for names in done["rewritten"].values() for name in names] == [
        part.weight.removeprefix(prefix) for part in patch.layers
    ]
    longer = {f"language.{name}": value for name, value in tensors(tmp_path / "bare").items()}
    for folder, extra in [
        ("longer", {}),
        ("twice", {f"vision.{name}": value.clone() for name, value in longer.items()}),
    ]:
        (tmp_path / folder).mkdir()
        save_file({**longer, **extra}, tmp_path / folder / "model.safetensors")
    bare = [LayerPatch(p.layer, p.weight.removeprefix(prefix), p.axis, p.neurons, p.old, p.new) for p in patch.layers]
    patch_checkpoint(tmp_path / "longer", Patch(tuple(bare), {}), tmp_path / "out2")
    with pytest.raises(PatchError, match=rf"no tensor {bare[0].weight}[\s\S]*2 such names: .*vision"):
        patch_checkpoint(tmp_path / "twice", Patch(tuple(bare), {}), tmp_path / "out3")


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = PLACES["llama"]["down"][0]
    (tmp_path / "source").mkdir()
    values = {name.format(layer): model.get_parameter(name.format(layer)).detach() for layer in (1, 2)}
    entries: dict[str, Any] = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    data = b"abc"
    for key, value in values.items():
        span = [len(data), len(data) + value.nbytes]
        entries[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": span}
        data += raw(value)
    header = json.dumps(entries).encode() + b" " * 3
    (tmp_path / "source" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    patch = make_patch(model)
    patch_checkpoint(tmp_path / "source", patch, tmp_path / "out")
    patch.apply(model)
    assert all(raw(tensors(tmp_path / "out")[key]) == raw(model.get_parameter(key)) for key in values)
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[8 + len(header) :][:3] == b"abc"


def refused(source: Path, patch: Patch, message: str, out: Path | None = None, **options: Any) -> None:
    """The patch is refused with the message; nothing is written or changed anywhere around the source."""
    before = snapshot(source.parent)
    with pytest.raises(InputError, match=message):
        patch_checkpoint(source, patch, out or source.parent / "out", **options)
    assert snapshot(source.parent) == before
    assert not (source.parent / "out").exists()


def test_other_weights_are_refused(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    refused(source, patch, r"not applied to the checkpoint", revert=True)
    patch_checkpoint(source, patch, tmp_path / "patched")
    refused(tmp_path / "patched", patch, "already applied to the checkpoint")
    one = tmp_path / "one"
    patch_checkpoint(source, Patch(patch.layers[1:], {}), one)
    refused(one, patch, r"differ in layer 2's down projection \(4 of 4 neurons\)\n")
    tiny_model("llama", dtype="fp32").save_pretrained(tmp_path / "fp32")
    refused(tmp_path / "fp32", patch, r"made in bf16[\s\S]*is in fp32[\s\S]*pke-fast edit --dtype fp32")
    tiny_model("gpt2", dtype="bf16").save_pretrained(tmp_path / "gpt2")
    refused(tmp_path / "gpt2", patch, r"no tensor model\.layers\.1\.mlp\.down_proj\.weight")
    turned = [LayerPatch(p.layer, p.weight, 0, p.neurons, p.old, p.new) for p in patch.layers]
    refused(source, Patch(tuple(turned), {}), r"another shape[\s\S]*\[more than 47, 32\]\n  got: \[32, 48\]")


def test_what_is_not_a_checkpoint_is_refused(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    refused(tmp_path / "none", patch, "no checkpoint folder")
    refused(source / "config.json", patch, r"no checkpoint folder[\s\S]*got: a file", out=tmp_path / "out")
    (tmp_path / "bin").mkdir()
    refused(tmp_path / "bin", patch, r"got: no weights")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path / "bin", patch, r"got: pytorch_model\.bin[\s\S]*save_pretrained")


def test_damaged_checkpoints_are_refused(saved: tuple[Path, Patch]) -> None:
    source, patch = saved
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = sorted(source.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    for broken in (data[:-1], data[:100], data[:5], b"", data + b"x", b"\xff" * 8 + data[8:]):
        shard.write_bytes(broken)
        refused(source, patch, rf"{shard.name} is cut short or damaged")
    shard.unlink()
    refused(source, patch, rf"names a shard that isn't there: {shard.name}")
    shard.write_bytes(data)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(text)
        refused(source, patch, r"index\.json is cut short or damaged")
    wrong = {**good["weight_map"], "model.norm.weight": "nowhere"}
    index.write_text(json.dumps({**good, "weight_map": wrong}))
    refused(source, patch, "isn't there: nowhere")
    wrong["model.norm.weight"] = next(
        name for name in wrong.values() if name != good["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps({**good, "weight_map": wrong}))
    refused(source, patch, r"says that model\.norm\.weight is in")


def test_bad_output_folders_are_refused(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    kept = tmp_path / "run" / "p.safetensors"
    patch.save(kept)
    for force in (False, True):
        refused(source, patch, "is read itself", out=source, force=force)
        refused(source, patch, "is inside", out=source / "out", force=force)
        refused(source, patch, "is around", out=tmp_path, force=force)
        refused(source, patch, r"is around .*p\.safetensors", out=tmp_path / "run", force=force, keep=[kept])
    (tmp_path / "link").symlink_to(source)
    refused(source, patch, "is read itself", out=tmp_path / "link", force=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_text("old")
    refused(source, patch, r"isn't empty[\s\S]*--force", out=tmp_path / "full")
    patch_checkpoint(source, patch, tmp_path / "full", force=True)
    assert not (tmp_path / "full" / "old").exists()
    assert (tmp_path / "full" / "config.json").exists()


@pytest.mark.parametrize("place", ["_share", "copy_shard", "verify"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interruptions_leave_nothing_behind(
    saved: tuple[Path, Patch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Any
) -> None:
    source, patch = saved
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = snapshot(tmp_path)
    real = getattr(checkpoint, place)

    def interrupted(*args: Any) -> None:
        real(*args)
        raise error

    monkeypatch.setattr(checkpoint, place, interrupted)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else PKEError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "the disk is full"):
        patch_checkpoint(source, patch, tmp_path / "out", force=True)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_the_disk_did_not_keep_is_noticed(
    saved: tuple[Path, Patch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, patch = saved
    monkeypatch.setattr(checkpoint, "copy_shard", lambda shard, copy, _: shutil.copyfile(shard, copy))
    with pytest.raises(PKEError, match="does not hold what was written"):
        patch_checkpoint(source, patch, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_in_another_format_are_named(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    (source / "pytorch_model.bin").write_bytes(b"x")
    assert patch_checkpoint(source, patch, tmp_path / "out")["other_weights"] == ["pytorch_model.bin"]


def test_the_model_is_not_loaded(saved: tuple[Path, Patch], tmp_path: Path) -> None:
    source, patch = saved
    patch.save(tmp_path / "p")
    code = (
        "import sys\nfrom pke_fast.patch import Patch\nfrom pke_fast.checkpoint import patch_checkpoint\n"
        "patch_checkpoint(sys.argv[1], Patch.load(sys.argv[2]), sys.argv[3])\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "p", tmp_path / "out"], check=True)
    assert (tmp_path / "out" / "config.json").exists()
