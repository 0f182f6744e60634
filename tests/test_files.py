"""Atomic files and folders: whole or not there, the old one kept until the new one stands, clear errors."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pke_fast import files
from pke_fast.errors import InputError, PKEError
from pke_fast.files import atomic_folder, atomic_write, check_output_folder, check_room


def tree(folder: Path) -> dict[str, str | None]:
    """Every path below the folder, with the text of the files."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in found}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Makes the system refuse to let a file grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_write_makes_parents_and_leaves_one_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b" / "x.json") as temporary:
        assert temporary.parent == tmp_path / "a" / "b"
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert not (tmp_path / "a" / "b" / "x.json").exists()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/x.json": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_write_interrupted_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(error), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), atomic_write(tmp_path / "made" / "x") as temporary:
        raise error
    assert tree(tmp_path) == {"x": "old"}


def test_write_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_write_to_a_folder_or_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="got: a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(InputError, match="can't write"), atomic_write(tmp_path / "file" / "x") as temporary:
        temporary.write_text("x")
    assert tree(tmp_path) == {"file": "x"}


def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    full = pytest.raises(PKEError, match="the disk is full")
    with full as caught, file_size_limit(1000), atomic_write(tmp_path / "x") as temporary:
        temporary.write_bytes(bytes(5000))
    assert caught.value.exit_status == 1
    full = pytest.raises(PKEError, match="the disk is full")
    with full, file_size_limit(1000), atomic_folder(tmp_path / "folder") as folder:
        (folder / "x").write_bytes(bytes(5000))
    assert tree(tmp_path) == {}


def test_full_disk_reported_by_safetensors(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(PKEError, match="the disk is full"), atomic_folder(tmp_path / "folder"):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError, match="not of the disk"), atomic_folder(tmp_path / "folder"):
        raise SafetensorError("not of the disk")
    assert tree(tmp_path) == {}


def test_no_permission_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Permission denied"), atomic_folder(tmp_path / "folder"):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")
    with pytest.raises(ConnectionError), atomic_folder(tmp_path / "folder"):
        raise ConnectionError("the hub doesn't answer")


def test_unwritable_place_is_found_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write everywhere, so it is acted
    with pytest.raises(InputError, match="no permission to write"):
        check_output_folder(tmp_path / "a" / "b")


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("2")
    assert tree(tmp_path) == {"a": None, "a/out": None, "a/out/x": "1", "empty": None, "empty/x": "2"}


def test_full_folder_needs_force_and_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(InputError, match=r"isn't empty[\s\S]*--force"), atomic_folder(out):
        pass
    with atomic_folder(out, force=True) as folder:
        (folder / "new").write_text("new")
        assert tree(out) == {"old": "old"}
    assert tree(tmp_path) == {"out": None, "out/new": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_folder_interrupted_keeps_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(error), atomic_folder(out, force=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("half")
        raise error
    with pytest.raises(error), atomic_folder(tmp_path / "made" / "out"):
        raise error
    assert tree(tmp_path) == {"out": None, "out/old": "old"}


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_interrupt_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    rename, calls = os.rename, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise KeyboardInterrupt
        rename(source, target)
        if calls == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, force=True) as folder:
        (folder / "x").write_text("new")
    assert calls >= at
    assert tree(tmp_path) == {"out": None, "out/x": "new" if (at, after) == (2, True) else "old"}


def test_interrupt_while_the_old_folder_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    rmtree, calls = shutil.rmtree, 0

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, force=True) as folder:
        (folder / "x").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/x": "new"}


def test_an_old_folder_that_cannot_be_deleted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")

    def refused(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path / "x"))

    monkeypatch.setattr(files.shutil, "rmtree", refused)
    with caplog.at_level(logging.WARNING), atomic_folder(out, force=True) as folder:
        (folder / "x").write_text("new")
    left, name = tree(tmp_path), next(path.name for path in tmp_path.iterdir() if path != out)
    assert left == {name: None, f"{name}/x": "old", "out": None, "out/x": "new"}
    (said,) = caplog.messages
    assert str(tmp_path / name) in said
    assert "Operation not permitted" in said


def test_folder_filled_by_another_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="isn't empty"), atomic_folder(out) as folder:
        (folder / "x").write_text("ours")
        out.mkdir()
        (out / "y").write_text("theirs")
    assert tree(tmp_path) == {"out": None, "out/y": "theirs"}


def test_check_refuses_files_and_folders_that_must_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    inner = tmp_path / "above" / "current"
    inner.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "file", force=True)
    with pytest.raises(InputError, match="through folders"):
        check_output_folder(tmp_path / "file" / "out")
    for folder, kind in [(inner, "current folder"), (inner.parent, "current folder"), (tmp_path / "home", "home")]:
        with pytest.raises(InputError, match=kind):
            check_output_folder(folder, force=True)
    check_output_folder("new")
    check_output_folder(tmp_path / "not" / "yet" / "there")
    assert not (tmp_path / "not").exists()


def test_check_keeps_what_is_read(tmp_path: Path) -> None:
    model, requests = tmp_path / "w" / "model", tmp_path / "w" / "data" / "requests.csv"
    model.mkdir(parents=True)
    requests.parent.mkdir()
    requests.write_text("x")
    (tmp_path / "link").symlink_to(model)
    given = [model, requests], [tmp_path / "w" / "state"]
    for out, message in (
        (model, "is read itself"),
        (tmp_path / "link", "is read itself"),
        (tmp_path / "w", f"is around {model}"),
        (requests.parent, f"is around {requests}"),
        (tmp_path / "w" / "state", "is read itself"),  # which isn't there yet
        (tmp_path / "w" / "state" / "out", "is inside"),
    ):
        for force in (False, True):
            with pytest.raises(InputError, match=message):
                check_output_folder(out, force, *given)
    with pytest.raises(InputError, match="is read itself"):
        check_output_folder(model, True, [tmp_path / "link"])
    for apart in ("out", "model2", "data/out", "model/out"):  # beside what is read, or within it
        check_output_folder(tmp_path / "w" / apart, True, *given)


def test_check_room(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1, "")
    with pytest.raises(InputError, match=r"no room in[\s\S]*free some space"):
        check_room(tmp_path / "not" / "there", 2**70, "free some space")
    assert not (tmp_path / "not").exists()
