"""Patches in place: a kill or an error at any call leaves the old weights or the new ones, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pke_fast import journal, stored
from pke_fast.checkpoint import patch_checkpoint
from pke_fast.errors import InputError, PatchError, PKEError
from pke_fast.inplace import patch_in_place
from pke_fast.journal import COPY, JOURNAL, UNFINISHED, recover
from pke_fast.patch import LayerPatch, Patch
from pke_fast.shards import read_checkpoint

# By layer, a Linear's and a Conv1D's: projection, its weight's name and shape, the axis and where neuron 0 is.
PLACES: list[list[tuple[Any, str, list[int], int, int]]] = [
    [
        ("gate", "h.0.gate_up.weight", [18, 5], 0, 0),
        ("up", "h.0.gate_up.weight", [18, 5], 0, 9),
        ("down", "h.0.down.weight", [5, 9], 1, 0),
    ],
    [("gate", "h.1.c_fc.weight", [5, 9], 1, 0), ("down", "h.1.c_proj.weight", [9, 5], 0, 0)],
]
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def part_of(layer: int, name: str, axis: int, weight: Tensor, kind: Any = "down", offset: int = 0) -> LayerPatch:
    ids = torch.tensor([0, 2, 3, 8])
    old = (weight[ids + offset] if axis == 0 else weight[:, ids + offset].T).contiguous()
    new = (old.view(BITS[old.dtype]) ^ 0x0101).view(old.dtype)  # both bytes of every value change
    return LayerPatch(layer, name, axis, ids, old, new, kind, offset)


def make(folder: Path, dtype: torch.dtype = torch.bfloat16, one_file: bool = False) -> Patch:
    """A checkpoint with a layer in each of two shards (and a third shard), and a patch of all of their projections."""
    generator = torch.Generator().manual_seed(0)
    files: list[dict[str, Tensor]] = [{"odd": torch.ones(3, dtype=torch.uint8)}, {}, {"norm": torch.ones(5)}]
    parts = []
    for layer, places in enumerate(PLACES):
        for kind, name, shape, axis, offset in places:
            weight = files[layer].setdefault(name, torch.randn(shape, generator=generator).to(dtype))
            parts.append(part_of(layer, name, axis, weight, kind, offset))
    folder.mkdir()
    if one_file:
        save_file({name: value for file in files for name, value in file.items()}, folder / "model.safetensors")
    else:
        for index, file in enumerate(files):
            save_file(file, folder / f"model-{index}.safetensors")
        index = {name: f"model-{i}.safetensors" for i, file in enumerate(files) for name in file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    return Patch(tuple(parts), {"base": {"name": "tiny"}})


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BAND", 40)  # bytes: two rows of 9 values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.usefixtures("small_bands")
def test_in_place_equals_the_copy(tmp_path: Path, dtype: torch.dtype, one_file: bool) -> None:
    patch = make(tmp_path / "model", dtype, one_file)
    before = state(tmp_path / "model")
    patch_checkpoint(tmp_path / "model", patch, tmp_path / "copy")
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "model").iterdir()}
    wanted = state(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")  # its untouched shards were links
    done = patch_in_place(tmp_path / "model", patch)
    assert state(tmp_path / "model") == wanted != before
    assert done["in_place"]
    assert done["neurons"] == 8
    assert done["own_copies"] == []
    assert done["recovered"] is None
    assert len(done["rewritten"]) == (1 if one_file else 2)
    assert sorted(name for names in done["rewritten"].values() for name in names) == sorted(
        {name for places in PLACES for _, name, *_ in places}
    )
    assert {path.name: path.stat().st_ino for path in (tmp_path / "model").iterdir()} == inodes
    assert patch_in_place(tmp_path / "model", patch, revert=True)["reverted"]
    assert state(tmp_path / "model") == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing that would write runs after it."""


@contextmanager
def failing(at: int, error: BaseException, dead: bool, of: str = "") -> Iterator[list[str]]:
    """Raises at call number `at` of those that write, a write after half of its bytes; at every later one if `dead`.

    Args:
        of: count the calls of this name alone.

    Yields the calls so far.
    """
    calls: list[str] = []

    def wrapped(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(name)
            count = calls.count(of) if of else len(calls)
            if (count == at and of in ("", name)) or (dead and count >= at):
                if count == at and "write" in name:
                    torn = args[1][: len(args[1]) // 2 | 1]  # an odd count tears a value
                    real(args[0], torn, *args[2:])
                raise error
            return real(*args)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in ("write", "pwrite", "fsync", "replace", "unlink"):
            patched.setattr(os, name, wrapped(name, getattr(os, name)))
        yield calls


def kill(at: int, job: Any, *args: Any, of: str = "", **options: Any) -> list[str] | None:
    """Runs a job that is killed at that call; the calls it made, or None if it ended before."""
    with failing(at, Killed(), dead=True, of=of) as calls:
        try:
            job(*args, **options)
        except Killed:
            return calls
    return None


@pytest.mark.parametrize("revert", [False, True])
@pytest.mark.usefixtures("small_bands")
def test_a_kill_at_any_call_leaves_old_or_new(tmp_path: Path, revert: bool) -> None:
    model = tmp_path / "model"
    patch = make(model)
    states = [state(model)]
    patch_in_place(model, patch)
    states.append(state(model))
    if not revert:
        patch_in_place(model, patch, revert=True)
        states.reverse()
    old, new = states[1], states[0]
    outcomes, between, at = [], 0, 1
    while (calls := kill(at, patch_in_place, model, patch, revert=revert)) is not None:
        left = {name: data for name, data in state(model).items() if name in old}
        between += left not in (old, new)
        recovery = recover(model)
        outcomes.append(recovery.outcome if recovery else None)
        after = state(model)
        assert after in (old, new), (at, calls[-1])
        assert after == new or outcomes[-1] != "completed"
        assert recover(model) is None
        if after == new:
            patch_in_place(model, patch, revert=not revert)
        at += 1
    assert between >= 6  # kills in the midst of the weights were among them
    # the journal is written and synced; renamed; the folder synced; weights written (columns in bands of two rows, runs
    # of neighbouring rows), synced, and read back; the journal removed; the folder synced
    expected = {"discarded": 2, "rolled back": 1, "completed": 1}
    assert all(outcomes.count(outcome) >= least for outcome, least in expected.items())
    order = {"discarded": 0, "rolled back": 1, "completed": 2, None: 3}
    assert [order[o] for o in outcomes] == sorted(order[o] for o in outcomes)
    assert state(model) == new


@pytest.mark.usefixtures("small_bands")
def test_a_kill_while_it_recovers_is_recovered_from(tmp_path: Path) -> None:
    patch = make(tmp_path / "model")
    old = state(tmp_path / "model")
    patch_in_place(tmp_path / "model", patch)
    new = state(tmp_path / "model")
    patch_in_place(tmp_path / "model", patch, revert=True)
    first = 1
    while kill(first, patch_in_place, tmp_path / "model", patch) is not None:
        if recover_kills(tmp_path / "model", old, new) == new:
            patch_in_place(tmp_path / "model", patch, revert=True)
        first += 3


def recover_kills(model: Path, old: dict[str, bytes], new: dict[str, bytes]) -> dict[str, bytes]:
    """Kills the recovery at its first call, then its second and so on, until it ends."""
    at = 1
    while kill(at, recover, model) is not None:
        at += 1
    assert state(model) in (old, new)
    return state(model)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(28, "No space left"), KeyboardInterrupt()])
@pytest.mark.usefixtures("small_bands")
def test_an_error_at_any_call_puts_the_old_weights_back(tmp_path: Path, error: BaseException) -> None:
    model = tmp_path / "model"
    patch = make(model)
    old = state(model)
    patch_in_place(model, patch)
    new = state(model)
    patch_in_place(model, patch, revert=True)
    at = 1
    while True:
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PKEError
        with failing(at, error, dead=False) as calls:
            try:
                patch_in_place(model, patch)
                break
            except expected:
                pass
        if calls[at - 2 : at] == ["unlink", "fsync"]:  # after the last step that counts
            assert state(model) == new
            patch_in_place(model, patch, revert=True)
        assert state(model) == old, (at, calls)
        at += 1
    assert at > 12
    assert state(model) == new


def test_where_the_old_weights_cannot_be_put_back_the_journal_stays(tmp_path: Path) -> None:
    patch = make(tmp_path / "model")
    old = state(tmp_path / "model")
    failure = OSError(5, "Input/output error")
    with (
        failing(1, failure, dead=True, of="pwrite"),
        pytest.raises(PKEError, match=r"half changed[\s\S]*run pke-fast recover"),
    ):
        patch_in_place(tmp_path / "model", patch)
    assert {name: data for name, data in state(tmp_path / "model").items() if name in old} != old
    with pytest.raises(InputError, match=r"in the middle of a change in place[\s\S]*pke-fast recover"):
        check_files(tmp_path / "model")
    recovery = recover(tmp_path / "model")
    assert recovery is not None
    assert recovery.outcome == "rolled back"
    assert "apply of a patch of tiny" in recovery.message
    assert state(tmp_path / "model") == old


def check_files(folder: Path) -> None:
    from pke_fast.sources import check_files

    check_files(folder)


def interrupted(model: Path, patch: Patch) -> dict[str, bytes]:
    """Kills a change in the middle of the weights; what the checkpoint held before."""
    old = state(model)
    assert kill(2, patch_in_place, model, patch, of="pwrite") is not None
    assert {name: data for name, data in state(model).items() if name in old} != old
    return old


@pytest.mark.usefixtures("small_bands")
def test_every_use_recovers_first(tmp_path: Path) -> None:
    patch = make(tmp_path / "model")
    old = interrupted(tmp_path / "model", patch)
    assert patch_checkpoint(tmp_path / "model", patch, tmp_path / "out")["recovered"] == "rolled back"
    assert state(tmp_path / "model") == old
    assert not (tmp_path / "out" / JOURNAL).exists()
    shutil.rmtree(tmp_path / "out")
    interrupted(tmp_path / "model", patch)
    with pytest.raises(PatchError, match="not applied"):
        patch_in_place(tmp_path / "model", patch, revert=True)
    assert state(tmp_path / "model") == old
    interrupted(tmp_path / "model", patch)
    done = patch_in_place(tmp_path / "model", patch)
    assert done["recovered"] == "rolled back"
    assert state(tmp_path / "model") != old


@pytest.mark.usefixtures("small_bands")
def test_a_journal_of_other_weights_changes_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    patch = make(model)
    interrupted(model, patch)
    shard = model / "model-0.safetensors"
    data = bytearray(shard.read_bytes())
    data[read_checkpoint(model)["h.0.down.weight"].offset] ^= 0xFF  # the first column is in the patch
    shard.write_bytes(data)
    left = state(model)
    with pytest.raises(PatchError, match=r"does not belong[\s\S]*neither the old nor the new[\s\S]*delete the journal"):
        patch_in_place(model, patch)
    (model / "model-0.safetensors").write_bytes(bytes(left["model-0.safetensors"]))
    for damaged in (left[JOURNAL][:-1], left[JOURNAL][:50], left[JOURNAL][:-3] + b"xyz", b""):
        (model / JOURNAL).write_bytes(damaged)
        with pytest.raises(PatchError, match=r"journal .* is damaged[\s\S]*get the checkpoint anew"):
            recover(model)
    (model / JOURNAL).write_bytes(left[JOURNAL])
    moved = {name: torch.zeros(shape, dtype=torch.bfloat16) for _, name, shape, *_ in PLACES[0]}
    save_file({**moved, "odd": torch.ones(3)}, shard)
    with pytest.raises(PatchError, match=r"does not belong[\s\S]*elsewhere"):
        recover(model)
    patch.save(model / JOURNAL)
    with pytest.raises(PatchError, match="is not a journal"):
        recover(model)


def test_unfinished_journals_and_copies_are_discarded(tmp_path: Path) -> None:
    patch = make(tmp_path / "model")
    old = state(tmp_path / "model")
    (tmp_path / "model" / UNFINISHED).write_bytes(b"begun")
    (tmp_path / "model" / COPY).write_bytes(b"begun")
    recovery = recover(tmp_path / "model")
    assert recovery is not None
    assert recovery.outcome == "discarded"
    assert state(tmp_path / "model") == old
    patch_in_place(tmp_path / "model", patch)


@pytest.mark.parametrize("at", [None, 1, 2, 3, 4])
def test_hard_linked_shards_get_bytes_of_their_own(tmp_path: Path, at: int | None) -> None:
    patch = make(tmp_path / "model")
    old = state(tmp_path / "model")
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "model").iterdir():
        os.link(path, tmp_path / "other" / path.name)
    (tmp_path / "model" / "model-0.safetensors").chmod(0o640)
    if at is not None:
        assert kill(at, patch_in_place, tmp_path / "model", patch) is not None
        recover(tmp_path / "model")
        assert state(tmp_path / "model") == state(tmp_path / "other") == old
        return
    done = patch_in_place(tmp_path / "model", patch)
    assert done["own_copies"] == ["model-0.safetensors", "model-1.safetensors"]
    assert state(tmp_path / "other") == old
    assert os.path.samefile(tmp_path / "model" / "model-2.safetensors", tmp_path / "other" / "model-2.safetensors")
    assert (tmp_path / "model" / "model-0.safetensors").stat().st_mode & 0o777 == 0o640
    assert patch_in_place(tmp_path / "model", patch, revert=True)["own_copies"] == []
    assert state(tmp_path / "model") == old


def refused(model: Path, patch: Patch, message: str, error: type[Exception] = InputError) -> None:
    before = state(model)
    with pytest.raises(error, match=message):
        patch_in_place(model, patch)
    assert state(model) == before


def test_what_cannot_be_changed_in_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    patch = make(model)
    with pytest.raises(InputError, match="no checkpoint folder"):
        patch_in_place(tmp_path / "none", patch)
    shard = model / "model-1.safetensors"
    data = shard.read_bytes()
    for broken in (data[:-1], data[:20], b"", data + b"x"):
        shard.write_bytes(broken)
        refused(model, patch, "model-1.safetensors is cut short or damaged")
    shard.unlink()
    refused(model, patch, "names a shard that isn't there: model-1.safetensors")
    (tmp_path / "blob").write_bytes(data)
    shard.symlink_to(tmp_path / "blob")
    refused(model, patch, r"symbolic link[\s\S]*blob[\s\S]*--out DIR instead")
    shard.unlink()
    shard.write_bytes(data)
    index = model / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model-1", "model-2"))
    refused(model, patch, "which hasn't it")
    index.write_text(good)
    other = make(tmp_path / "other", torch.float32)
    refused(model, other, r"made in fp32[\s\S]*is in bf16", PatchError)
    patch_in_place(model, patch)
    refused(model, patch, "already applied", PatchError)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).suffix != ".safetensors")
    refused(model, patch, "no permission to write")


def test_what_is_in_use_is_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "model"
    patch = make(model)
    with journal.reading(model):
        refused(model, patch, "another pke-fast is using")
        patch_checkpoint(model, patch, tmp_path / "out")  # readers don't mind each other
        shutil.rmtree(tmp_path / "out")
    with journal.changing(model):
        (model / UNFINISHED).write_bytes(b"begun")
        for use in (lambda: recover(model), lambda: patch_checkpoint(model, patch, tmp_path / "out")):
            with pytest.raises(InputError, match="another pke-fast is"):
                use()
        assert (model / UNFINISHED).exists()
    assert patch_in_place(model, patch)["recovered"] == "discarded"


def test_without_locks_only_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = make(tmp_path / "model")

    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    refused(tmp_path / "model", patch, r"can't be locked[\s\S]*--out instead")
    patch_checkpoint(tmp_path / "model", patch, tmp_path / "out")


CHANGE = """
import sys
from pke_fast.inplace import patch_in_place
from pke_fast.patch import Patch
patch, revert = Patch.load(sys.argv[2]), sys.argv[3] == "revert"
print("ready", flush=True)
while True:
    patch_in_place(sys.argv[1], patch, revert=revert)
    revert = not revert
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """A real process that applies and reverts over and over, killed ten times."""
    model, name = tmp_path / "model", "h.0.down.weight"
    model.mkdir()
    weight = torch.randn(512, 4096).to(torch.bfloat16)
    save_file({name: weight}, model / "model.safetensors")
    patch = Patch((part_of(0, name, 1, weight),), {})
    patch.save(tmp_path / "patch")
    states = [state(model)]
    patch_in_place(model, patch)
    states.append(state(model))
    chance, outcomes = random.Random(0), []
    for _ in range(10):
        way = "apply" if state(model) == states[0] else "revert"
        command = [sys.executable, "-c", CHANGE, str(model), str(tmp_path / "patch"), way]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.3))
            process.kill()
        recovery = recover(model)
        outcomes.append(recovery.outcome if recovery else None)
        assert state(model) in states
    # What a kill hits is chance, and the simulated ones hit everything: here nothing but the states counts.
    assert len(outcomes) == 10
