"""The patch between two checkpoints: the neurons that differ, to the bit, and nothing passed over."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from neuron_patches import PLACES, all_of, part_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from pke_fast import diff, stored
from pke_fast.checkpoint import patch_checkpoint
from pke_fast.diff import Other, diff_checkpoints
from pke_fast.errors import InputError, PatchError
from pke_fast.journal import UNFINISHED
from pke_fast.patch import LayerPatch, Patch
from pke_fast.projections import Projection, find_projections
from pke_fast.shards import read_checkpoint
from pke_fast.testing import FAMILIES, LAYERS, NEURONS, tiny_model

SHARDS = "15KB"


IDS = {"gate": [1, 7, 46], "up": [0, 7, 8, 47], "down": [0, 7, 8, 47]}


def change(model, family: str, layers=(0, 2), ids=IDS) -> Patch:
    """A patch of all projections of a model, whose changes are of single bits, of signs of zero and of NaN."""

    def new_of(old: Tensor) -> Tensor:
        new = old.clone()
        new[0, 3], new[1, 4] = 5.0, float("nan")
        for row in range(2, len(new)):
            new[row, row] = -new[row, row]
        return new

    parts = [part_of(model, family, kind, n, ids[kind], new_of) for n in layers for kind in all_of(family)]
    return Patch(tuple(parts), {})


def same(a: Patch, b: Patch) -> bool:
    def key(part: LayerPatch):
        values = (part.old.view(torch.uint8).tolist(), part.new.view(torch.uint8).tolist())
        place = (part.layer, part.weight, part.axis, part.projection, part.offset)
        return place, part.neurons.tolist(), part.old.dtype, values

    return [key(part) for part in a.layers] == [key(part) for part in b.layers]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bf16"), ("gpt2", "fp16"), ("gpt_neox", "fp32"), ("phi3", "bf16"), ("gpt2", "fp32")]
)
def test_it_gives_back_the_patch(family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, dtype=dtype)
    patch = change(model, family)
    model.save_pretrained(tmp_path / "a", max_shard_size=SHARDS)
    patch_checkpoint(tmp_path / "a", patch, tmp_path / "b")
    for band in (200, stored.BAND):
        monkeypatch.setattr(stored, "BAND", band)
        found = diff_checkpoints(tmp_path / "a", tmp_path / "b")
        neurons = {n for kind in all_of(family) for n in IDS[kind]}
        assert found.neurons == {0: len(neurons), 2: len(neurons)}
        assert found.others == ()
        assert found.patch is not None
        assert same(found.patch, patch)
    assert found.tensors == len(read_checkpoint(tmp_path / "a"))
    back = diff_checkpoints(tmp_path / "b", tmp_path / "a").patch
    assert back is not None
    swapped = [replace(part, old=part.new, new=part.old) for part in patch.layers]
    assert same(back, Patch(tuple(swapped), {}))
    found.patch.save(tmp_path / "p")
    again = diff_checkpoints(tmp_path / "a", tmp_path / "b").patch
    assert again is not None
    again.save(tmp_path / "q")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    assert diff_checkpoints(tmp_path / "a", tmp_path / "a").patch is None
    assert diff_checkpoints(tmp_path / "a", tmp_path / "b", want_patch=False).patch is None


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_every_family(family: str, tmp_path: Path) -> None:
    """By the configuration, and the same by name alone."""
    tiny_model(family).save_pretrained(tmp_path / "a")
    by_config = find_projections(tmp_path / "a", read_checkpoint(tmp_path / "a"))
    places = PLACES.get(family, PLACES["llama"])
    assert {name: projections for name, projections in by_config.items() if projections[0].layer == 1} == {
        pattern.format(1): [
            Projection(1, kind, name.format(1), axis, NEURONS, offset)  # type: ignore[arg-type]
            for kind, (name, axis, offset) in places.items()
            if name == pattern
        ]
        for pattern, _, _ in places.values()
    }
    assert len(by_config) == LAYERS * len({name for name, _, _ in places.values()})
    (tmp_path / "a" / "config.json").unlink()
    assert find_projections(tmp_path / "a", read_checkpoint(tmp_path / "a")) == by_config


def changed(source: Path, out: Path, change) -> Path:
    """A copy of a checkpoint of one file with its tensors changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


GATE, DOWN = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "a"
    tiny_model("llama", dtype="bf16").save_pretrained(folder)
    return folder


ATTENTION = "model.layers.1.self_attn.q_proj.weight"


def test_what_a_patch_cannot_hold_is_listed_and_refused(base: Path, tmp_path: Path) -> None:
    def edit(tensors) -> None:
        tensors[GATE][[2, 9]] += 1
        tensors[ATTENTION][[2, 5]] += 1
        tensors["model.norm.weight"][3] += 1
        tensors[DOWN][:, 9] += 1

    other = changed(base, tmp_path / "b", edit)
    with pytest.raises(PatchError, match=r"more than MLP neurons' weights[\s\S]*q_proj[\s\S]*--ignore-others"):
        diff_checkpoints(base, other)
    found = diff_checkpoints(base, other, want_patch=False)
    assert sorted(found.others, key=lambda o: o.tensor) == [
        Other(ATTENTION, "other", 2, 32),
        Other("model.norm.weight", "other", 1, 32),
    ]
    assert found.neurons == {1: 2}
    found = diff_checkpoints(base, other, ignore_others=True)
    assert found.patch is not None
    assert [(part.projection, part.neurons.tolist()) for part in found.patch.layers] == [
        ("gate", [2, 9]),
        ("down", [9]),
    ]
    assert sorted(found.patch.meta["made_from"]["ignored"]) == [ATTENTION, "model.norm.weight"]


def test_by_name_alone_gate_and_up_are_what_fits_the_down_projection(tmp_path: Path) -> None:
    """A router, which is no input of the MLP's neurons, isn't one; neither are three inputs."""
    names = {"w2": [4, 6], "w1": [6, 4], "w3": [6, 4], "gate": [2, 4], "norm": [4]}
    tensors = {f"layers.0.feed_forward.{name}.weight": torch.zeros(shape) for name, shape in names.items()}
    tensors |= {f"layers.1.feed_forward.{name}.weight": torch.zeros(names[name]) for name in ("w2", "w1")}
    tensors["layers.1.feed_forward.gate_side.weight"] = torch.zeros(6, 4)
    tensors |= {f"layers.2.feed_forward.{name}.weight": torch.zeros(names[name]) for name in names}
    tensors["layers.2.feed_forward.w4.weight"] = torch.zeros(6, 4)
    tensors |= {
        "layers.3.feed_forward.w2.weight": torch.zeros(6, 4),
        "layers.3.feed_forward.in.weight": torch.zeros(4, 12),
    }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    found = find_projections(tmp_path / "a", read_checkpoint(tmp_path / "a"))
    layers = [
        {
            projection.kind: (name.split(".")[-2], projection.axis, projection.offset)
            for name, projections in found.items()
            for projection in projections
            if projection.layer == layer
        }
        for layer in range(4)
    ]
    assert layers == [
        {"down": ("w2", 1, 0), "gate": ("w1", 0, 0), "up": ("w3", 0, 0)},
        {"down": ("w2", 1, 0), "gate": ("gate_side", 0, 0), "up": ("w1", 0, 0)},
        {"down": ("w2", 1, 0)},
        {"down": ("w2", 0, 0), "gate": ("in", 1, 0), "up": ("in", 1, 6)},
    ]


def test_weights_in_a_dtype_that_patches_lack_are_listed(tmp_path: Path) -> None:
    tiny_model("phi3").double().save_pretrained(tmp_path / "a")
    fused = "model.layers.0.mlp.gate_up_proj.weight"

    def edit(tensors) -> None:
        tensors[fused][49] += 1

    found = diff_checkpoints(tmp_path / "a", changed(tmp_path / "a", tmp_path / "b", edit), want_patch=False)
    assert (found.others, found.neurons) == ((Other(fused, "gate and up", 1, 96),), {})


def test_other_models_are_refused(base: Path, tmp_path: Path) -> None:
    lacking = changed(base, tmp_path / "lacking", lambda tensors: tensors.pop(GATE))
    for pair in ((base, lacking), (lacking, base)):
        with pytest.raises(InputError, match=rf"other tensors[\s\S]*{GATE}, which .*lacking lacks"):
            diff_checkpoints(*pair)
    turned = changed(base, tmp_path / "turned", lambda t: t.update({DOWN: t[DOWN].T.contiguous()}))
    with pytest.raises(InputError, match=r"another shape or dtype[\s\S]*\[32, 48\] BF16[\s\S]*\[48, 32\]"):
        diff_checkpoints(base, turned)
    single = changed(base, tmp_path / "single", lambda t: t.update({DOWN: t[DOWN].float()}))
    with pytest.raises(InputError, match="BF16"):
        diff_checkpoints(base, single)
    with pytest.raises(InputError, match="no checkpoint folder"):
        diff_checkpoints(base, tmp_path / "none")
    (single / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="cut short"):
        diff_checkpoints(base, single)


def test_names_that_say_nothing_are_refused(tmp_path: Path) -> None:
    for folder, tensors, message in (
        ("none", {"a.weight": torch.ones(2, 3)}, "can't tell which tensors"),
        ("square", {"h.0.mlp.c_proj.weight": torch.ones(3, 3)}, "square"),
        ("two", {f"{s}.0.mlp.down_proj.weight": torch.ones(2, 3) for s in "ab"}, "can't tell which tensors"),
    ):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        with pytest.raises(InputError, match=message):
            diff_checkpoints(tmp_path / folder, tmp_path / folder)
    (tmp_path / "two" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match=r"doesn't fit its config.json"):
        diff_checkpoints(tmp_path / "two", tmp_path / "two")


def test_every_tensor_counts_whatever_its_dtype(tmp_path: Path) -> None:
    """Integers, empty ones, scalars and three dimensions; NaN equals itself, and -0 is not 0."""
    tensors = {
        "h.0.mlp.down_proj.weight": torch.tensor([[0.0, float("nan"), 1.0], [1.0, 2.0, 3.0]]),
        "ids": torch.arange(4),
        "none": torch.empty(0, 3),
        "one": torch.tensor(1.5),
        "deep": torch.zeros(2, 3, 2, dtype=torch.float64),
    }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")

    def edit(found) -> None:
        found["h.0.mlp.down_proj.weight"][0, 0] = -0.0
        found["ids"][2] = 7
        found["one"].fill_(2.0)
        found["deep"][1, 2, 0] = 1

    other = changed(tmp_path / "a", tmp_path / "b", edit)
    found = diff_checkpoints(tmp_path / "a", other, ignore_others=True)
    assert {(o.tensor, o.rows, o.of) for o in found.others} == {("ids", 1, 4), ("one", 1, 1), ("deep", 1, 6)}
    assert found.patch is not None
    assert found.patch.layers[0].neurons.tolist() == [0]


def test_linked_shards_are_not_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    for path in base.iterdir():
        os.link(path, tmp_path / "b" / path.name)
    monkeypatch.setattr(diff, "read_at", None)
    assert diff_checkpoints(base, tmp_path / "b").neurons == {}


def test_an_interrupted_change_is_ended_first(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "b")
    (tmp_path / "b" / UNFINISHED).write_bytes(b"x")
    assert diff_checkpoints(base, tmp_path / "b").recovered == (None, "discarded")
    assert not (tmp_path / "b" / UNFINISHED).exists()
