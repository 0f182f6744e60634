"""Pickled checkpoints: refused unless asked for, then the same weights in safetensors, and no code is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pke_fast.checkpoint import patch_checkpoint
from pke_fast.errors import InputError
from pke_fast.inplace import patch_in_place
from pke_fast.patch import LayerPatch, Patch

NAME = "model.layers.{}.mlp.down_proj.weight"


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {NAME.format(layer): torch.randn(4, 6, generator=generator).bfloat16() for layer in (0, 1)}
    table = torch.randn(5, 4, generator=generator)
    strided = torch.arange(12.0).reshape(3, 4).T
    return {
        **found,
        "embed": table,
        "head": table,
        "strided": strided,
        "ids": torch.arange(3),
        "one": torch.tensor(2.5),
    }


def patch_of(tensors: dict[str, Tensor]) -> Patch:
    parts = []
    for layer in (0, 1):
        old = tensors[NAME.format(layer)][:, [1, 5]].T.contiguous()
        parts.append(LayerPatch(layer, NAME.format(layer), 1, torch.tensor([1, 5]), old, old + 1))
    return Patch(tuple(parts), {})


def make(folder: Path, shards: int, zipped: bool = True) -> dict[str, Tensor]:
    tensors = weights()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return tensors
    index = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[number::shards])
        torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)
        index.update(dict.fromkeys(part, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"x": 1}, "weight_map": index}))
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_converted_and_patched(tmp_path: Path, shards: int, zipped: bool) -> None:
    tensors = make(tmp_path / "a", shards, zipped)
    patch = patch_of(tensors)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    done = patch_checkpoint(tmp_path / "a", patch, tmp_path / "b", allow_pickle=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert len(done["converted"]) == (1 if shards == 1 else 3)
    assert not list((tmp_path / "b").glob("pytorch_model*"))
    expected = {name: value.clone() for name, value in tensors.items()}
    for part in patch.layers:
        expected[part.weight][:, part.neurons] = part.new.T
    written = read(tmp_path / "b")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value)
    if shards == 2:
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"x": 1}
        assert index["weight_map"][NAME.format(1)] == "model-00002-of-00002.safetensors"
    patch_in_place(tmp_path / "b", patch, revert=True)
    assert torch.equal(read(tmp_path / "b")[NAME.format(0)], tensors[NAME.format(0)])


def refused(folder: Path, patch: Patch, message: str, allow_pickle: bool = True) -> None:
    with pytest.raises(InputError, match=message):
        patch_checkpoint(folder, patch, folder.parent / "out", allow_pickle=allow_pickle)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


class Harm:
    """A pickle that would make a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    patch = patch_of(make(folder, 1))
    refused(folder, patch, r"got: pytorch_model\.bin[\s\S]*--allow-pickle", allow_pickle=False)
    with pytest.raises(InputError, match="--allow-pickle"):
        patch_in_place(folder, patch)
    path = folder / "pytorch_model.bin"
    good = path.read_bytes()
    torch.save({"a": Harm(tmp_path / "harm")}, path)
    refused(folder, patch, "without running code")
    for damaged in (good[: len(good) // 2], b"", b"hello"):
        path.write_bytes(damaged)
        refused(folder, patch, "or is damaged")
    sparse = {"a": torch.eye(2).to_sparse()}
    for held, message in (([1], "holds no weights"), ({"a": 1}, "'a': int"), (sparse, "sparse")):
        torch.save(held, path)
        refused(folder, patch, message)
    path.write_bytes(good)
    other = weights()
    other[NAME.format(0)] += 1
    refused(folder, patch_of(other), r"the weights differ in layer 0")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    refused(folder, patch, r"CVE-2025-32434[\s\S]*torch 2.6")


def test_bad_indexes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    patch = patch_of(make(folder, 2))
    index = folder / "pytorch_model.bin.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(good.values()))
    for text, message in (
        ("[]", "no weight_map"),
        (json.dumps({"weight_map": {"a": "../x.bin"}}), "isn't there"),
        (json.dumps({"weight_map": {**good, "embed": first, "head": second, "ids": first}}), "which hasn't it"),
    ):
        index.write_text(text)
        refused(folder, patch, message)
