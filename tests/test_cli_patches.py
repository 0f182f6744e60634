"""The commands on patches and checkpoints on disk: what they write, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pke_fast.cli import main
from pke_fast.journal import UNFINISHED
from pke_fast.patch import LayerPatch, Patch

NAME = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A checkpoint of two down projections [4, 6], and patches a and b of one layer each."""
    weights = {NAME.format(layer): torch.arange(24.0).reshape(4, 6) + layer for layer in (0, 1)}
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    for layer, name in enumerate("ab"):
        old = weights[NAME.format(layer)][:, [1, 5]].T
        part = LayerPatch(layer, NAME.format(layer), 1, torch.tensor([1, 5]), old, old + 8)
        Patch((part,), {"base": {"name": "tiny"}}).save(tmp_path / f"{name}.safetensors")
    return tmp_path


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def done(capsys: Any, *arguments: object) -> Any:
    """The JSON that a command prints, which succeeds."""
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def bad(capsys: Any, message: str, *arguments: object) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def weight(folder: Path, layer: int) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[NAME.format(layer)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["scale", "a.safetensors", "--by", 0.5, "--out", "a.safetensors"],
        ["merge", "a.safetensors", "b.safetensors", "--out", "link.safetensors"],
        ["diff", "model", "model", "--out", "model/model.safetensors"],
    ],
)
def test_what_is_read_isnt_replaced_by_force_either(
    arguments: list[object], files: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    Path("link.safetensors").symlink_to("b.safetensors")
    before = {path: path.read_bytes() for path in files.rglob("*.safetensors")}
    bad(capsys, "is read itself", *arguments, "--force")
    assert {path: path.read_bytes() for path in files.rglob("*.safetensors")} == before


def test_apply_and_revert_in_place(files: Path, capsys: Any) -> None:
    model, patch = files / "model", files / "a.safetensors"
    before = (model / "model.safetensors").read_bytes()
    summary = done(capsys, "apply", "--model", model, "--patch", patch, "--in-place")
    assert summary["in_place"]
    assert summary["neurons"] == 2
    assert weight(model, 0)[:, 5].tolist() == [13, 19, 25, 31]
    bad(capsys, "already applied", "apply", "--model", model, "--patch", patch, "--in-place")
    bad(capsys, "--force has no meaning", "revert", "--model", model, "--patch", patch, "--in-place", "--force")
    status, out, _ = run(capsys, "revert", "--model", model, "--patch", patch, "--in-place")
    assert status == 0
    assert "Reverted" in out
    assert (model / "model.safetensors").read_bytes() == before
    for where in ([], ["--in-place", "--out", files / "out"]):
        with pytest.raises(SystemExit) as ended:
            run(capsys, "apply", "--model", model, "--patch", patch, *where)
        assert ended.value.code == 2


def test_the_patch_is_not_replaced(files: Path, capsys: Any) -> None:
    (files / "run").mkdir()
    patch = (files / "a.safetensors").rename(files / "run" / "patch.safetensors")
    for command in (["apply"], ["revert"], ["export", "--format", "peft"]):
        given = *command, "--model", files / "model", "--patch", patch
        bad(capsys, "which is read", *given, "--out", files / "run", "--force")
    assert patch.exists()


def test_a_patch_with_a_nan_is_shown_and_not_applied(files: Path, capsys: Any) -> None:
    patch = Patch.load(files / "a.safetensors")
    patch.layers[0].new[1, 2] = torch.nan
    patch.save(files / "nan.safetensors")
    assert done(capsys, "show", files / "nan.safetensors")["layers"][0]["relative_change"] is None
    before = (files / "model" / "model.safetensors").read_bytes()
    for where in (["--in-place"], ["--out", files / "out"]):
        given = "--model", files / "model", "--patch", files / "nan.safetensors", *where
        bad(capsys, "weights that aren't finite", "apply", *given)
    assert (files / "model" / "model.safetensors").read_bytes() == before


def test_what_was_interrupted_is_told(files: Path, capsys: Any) -> None:
    model, patch = files / "model", files / "a.safetensors"
    (model / UNFINISHED).write_bytes(b"x")
    status, _, err = run(capsys, "revert", "--model", model, "--patch", patch, "--in-place")
    assert status == 2
    assert "was interrupted before any weight was touched" in " ".join(err.split())
    assert "not applied" in err
    assert done(capsys, "recover", model) == {"model": str(model), "recovered": None}
    (model / UNFINISHED).write_bytes(b"x")
    assert done(capsys, "recover", model) == {"model": str(model), "recovered": "discarded"}
    (model / UNFINISHED).write_bytes(b"x")
    assert done(capsys, "apply", "--model", model, "--patch", patch, "--in-place")["recovered"] == "discarded"
    bad(capsys, "no checkpoint folder", "recover", files / "none")


def test_diff(files: Path, capsys: Any) -> None:
    model, made = files / "model", files / "made.safetensors"
    done(capsys, "apply", "--model", model, "--patch", files / "a.safetensors", "--out", files / "after")
    summary = done(capsys, "diff", model, files / "after")
    assert summary["neurons"] == 2
    assert summary["by_layer"] == {"0": 2}
    assert summary["out"] is None
    assert done(capsys, "diff", model, files / "after", "--out", made)["out"] == str(made)
    done(capsys, "revert", "--model", files / "after", "--patch", made, "--out", files / "back")
    assert (files / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert done(capsys, "show", made)["made_from"]["how"] == "diff"
    bad(capsys, "is there already", "diff", model, files / "after", "--out", made)
    assert run(capsys, "diff", model, files / "after", "--out", made, "--force")[0] == 0
    bad(capsys, "there is no patch to write", "diff", model, model, "--out", files / "none")
    changed = {**load_file(model / "model.safetensors"), NAME.format(0): torch.zeros(4, 6)}
    changed["extra"] = torch.ones(2)
    save_file(changed, files / "after" / "model.safetensors")
    bad(capsys, "other tensors", "diff", model, files / "after", "--out", files / "none")
    assert not (files / "none").exists()


def test_rows_of_gate_and_up_are_a_patch_too(files: Path, capsys: Any) -> None:
    model, after, made = files / "model", files / "after", files / "made.safetensors"
    names = {kind: f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up")}
    weights = load_file(model / "model.safetensors") | {name: torch.randn(6, 4) for name in names.values()}
    save_file(weights, model / "model.safetensors")
    changed = {name: value.clone() for name, value in weights.items()}
    changed[names["gate"]][[1, 5]] += 1
    changed[names["up"]][5] += 1
    changed[NAME.format(1)][:, 2] += 1
    after.mkdir()
    save_file(changed, after / "model.safetensors")
    summary = done(capsys, "diff", model, after, "--out", made)
    assert (summary["neurons"], summary["by_layer"], summary["others"]) == (3, {"1": 3}, [])
    shown = done(capsys, "show", made)["layers"]
    assert [(part["projection"], part["axis"], part["neurons"]) for part in shown] == [
        ("gate", 0, 2), ("up", 0, 1), ("down", 1, 1),
    ]  # fmt: skip
    status, text, _ = run(capsys, "show", made)
    assert status == 0
    assert all(kind in text for kind in ("gate", "up", "down"))
    done(capsys, "apply", "--model", model, "--patch", made, "--in-place")
    assert (model / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()


def test_merge_and_scale(files: Path, capsys: Any) -> None:
    model, a, b, both = files / "model", files / "a.safetensors", files / "b.safetensors", files / "both.safetensors"
    summary = done(capsys, "merge", a, b, "--out", both)
    assert summary["neurons"] == 4
    assert [part["relation"] for part in summary["patches"]] == ["first", "disjoint"]
    done(capsys, "apply", "--model", model, "--patch", both, "--out", files / "after", "--scale", 0.5)
    assert weight(files / "after", 0)[:, 5].tolist() == [9, 15, 21, 27]
    assert weight(files / "after", 1)[:, 1].tolist() == [6, 12, 18, 24]
    bad(capsys, "is there already", "scale", both, "--by", 0.5, "--out", a)
    assert done(capsys, "scale", both, "--by", 0.5, "--out", files / "half")["neurons"] == 4
    back = ["revert", "--model", files / "after", "--patch"]
    done(capsys, *back, files / "half", "--out", files / "back")
    assert (files / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert done(capsys, *back, both, "--scale", 0.5, "--in-place")["scale"] == 0.5
    assert weight(files / "after", 0).equal(weight(model, 0))
    assert done(capsys, "show", files / "half")["made_from"]["by"] == 0.5
    bad(capsys, "a finite number", "scale", both, "--by", "nan", "--out", files / "none")
    done(capsys, "scale", a, "--by", 2, "--out", files / "twice")
    bad(capsys, "change the same neurons to other weights", "merge", a, files / "twice", "--out", files / "none")
    bad(capsys, "two patches or more", "merge", a, "--out", files / "none")
    assert not (files / "none").exists()
