"""Output that appears whole or not at all: written beside its place under a temporary name, then renamed."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pke_fast.errors import InputError, PKEError

LOG = logging.getLogger(__name__)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BAD_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path` (same suffix); what is written there becomes `path` at the end.

    A file that was there before is replaced at the end and not before. On any exception the temporary file is removed.
    Missing parent folders are made. A symbolic link is followed.

    Raises:
        InputError: `path` is a folder, or its folder can't be written to.
        PKEError: the disk is full, or another error of the system.
    """
    path = Path(os.path.realpath(path))
    with explained_write(path), _parents(path):
        if path.is_dir():
            raise InputError(f"can't write {path}", expected="the name of a file", got="a folder")
        temporary = _beside(path)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which is renamed to `path` at the end.

    With `force`, a folder that is there already is replaced as a whole: it stays as it is until the new one is
    complete, and is deleted only once the new one stands in its place. On any exception (Ctrl-C too) the temporary
    folder is removed and `path` is as it was. Missing parent folders are made. A symbolic link is followed.

    Raises:
        InputError: as `check_output_folder`.
        PKEError: the disk is full, or another error of the system.
    """
    path = Path(os.path.realpath(path))
    with explained_write(path):
        check_output_folder(path, force)
        with _parents(path):
            temporary = _beside(path)
            try:
                temporary.mkdir()
                yield temporary
                check_output_folder(path, force)  # someone else may have written there meanwhile
                _put_in_place(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def check_output_folder(
    path: str | Path, force: bool = False, keep: Iterable[str | Path] = (), apart: Iterable[str | Path] = ()
) -> None:
    """Checks that a result can be written to the folder `path`; changes nothing.

    Args:
        keep: files and folders that are read: `path` may be none of them, nor around one.
        apart: such folders that `path` may not lie in either, since they are copied or deleted whole.

    Raises:
        InputError: it is a file; it isn't empty and `force` isn't given; its place can't be written to; or it can't or
            shouldn't be replaced as a whole (what is read, the current folder or one above it, the home folder, a mount
            point).
    """
    path = Path(os.path.realpath(path))
    with explained_write(path):
        for name in keep:
            _check_apart(path, Path(os.path.realpath(name)), within=True)
        for name in apart:
            _check_apart(path, Path(os.path.realpath(name)), within=False)
        if path.exists():
            _check_replaceable(path, force)
        _check_place(path)


def _check_apart(path: Path, kept: Path, within: bool) -> None:
    if path == kept:
        place = "read itself"
    elif path in kept.parents:
        place = f"around {kept}, which is read"
    elif kept in path.parents and not within:
        place = f"inside {kept}, which is read"
    else:
        return
    raise InputError(
        f"the output folder {path} is {place}",
        expected="a folder apart from all that is read, which is never changed",
        do="choose another folder",
    )


def check_room(path: str | Path, size: int, do: str) -> None:
    """Raises InputError where the disk of `path` hasn't so many bytes free; `do` says what to do about it."""
    usage = shutil.disk_usage(_nearest(Path(os.path.realpath(path))))
    if usage.total and usage.free < size:  # a file system that can't tell says 0 of 0
        raise InputError(
            f"no room in {path}",
            expected=f"{size / 2**20:,.0f} MiB free",
            got=f"{usage.free / 2**20:,.0f} MiB",
            do=do,
        )


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def _check_place(path: Path) -> None:
    place = _nearest(path.parent)
    if not place.is_dir():
        raise InputError(f"can't write {path}", expected="a path through folders", got=f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"can't write {path}", got=f"no permission to write in {place}", do="choose a place you may write to"
        )


def _check_replaceable(path: Path, force: bool) -> None:
    if not path.is_dir():
        raise InputError(f"the output folder {path} is a file", expected="a new or an empty folder", got="a file")
    if any(path.iterdir()) and not force:
        raise InputError(
            f"the output folder {path} isn't empty",
            expected="a new or an empty folder",
            got=f"{sum(1 for _ in path.iterdir())} entries in it",
            do="choose another folder, or give --force to replace the whole folder",
        )
    current = Path(os.path.realpath(os.curdir))
    if path == current or path in current.parents:
        kind = "the current folder, or above it"
    elif path == Path(os.path.realpath(os.path.expanduser("~"))):
        kind = "the home folder"
    elif os.path.ismount(path):
        kind = "a mount point"
    else:
        return
    raise InputError(
        f"the output folder {path} can't be replaced: it is {kind}",
        expected="a folder that the result can replace as a whole",
        do=f"name a new folder inside it, such as {path / 'result'}",
    )


def _put_in_place(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder that was at `path` is deleted after that, or put back if it didn't work.

    What can't be deleted of it is told: the new one stands in its place all the same.
    """
    old = _beside(path)
    try:
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        if old.exists():
            _delete(old, path)
    except BaseException:
        # An interrupt can come between any two lines above: the disk tells how far it went.
        if old.exists() and path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.rename(old, path)
        raise


def _delete(old: Path, path: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(old, ignore_errors=True)  # the rest of it
        if old.exists():
            LOG.warning("%s is written; what was there before can't be deleted and is left in %s: %s", path, old, error)


def check_output_file(path: str | Path, force: bool = False, keep: Iterable[str | Path] = ()) -> None:
    """Checks that a result can be written to the file `path`; changes nothing.

    Args:
        keep: files and folders that are read: `path` may be none of them, and no file that is in one.

    Raises:
        InputError: it is there and `force` isn't given, it is a folder, or is read; or its place can't be written to.
    """
    path = Path(os.path.realpath(path))
    for kept in (Path(os.path.realpath(name)) for name in keep):
        if path == kept or (path.exists() and kept in path.parents):
            raise InputError(
                f"the output file {path} is read itself",
                expected="a file apart from all that is read, which is never changed",
                do="choose another file",
            )
    if path.is_dir():
        raise InputError(f"can't write {path}", expected="the name of a file", got="a folder")
    if path.exists() and not force:
        raise InputError(f"{path} is there already", expected="a new file", do="name another one, or give --force")
    with explained_write(path):
        _check_place(path)


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed, made and removed in a folder last, whatever happens to the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file in and below a folder, but for hidden ones: caches and repositories, not parts of a checkpoint."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from visible_files(path)
        elif path.is_file():
            yield path


def _beside(path: Path) -> Path:
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the missing parent folders of `path`, and removes them again if the block fails."""
    missing = []
    place = path.parent
    while not place.exists():
        missing.append(place)
        place = place.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # never made, or no longer empty: then it isn't ours to remove
                folder.rmdir()
        raise


@contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Turns the system's errors while writing `path` into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the file system's: an error of the network, for one, is an OSError too
            raise
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        if error.errno in _BAD_PLACE:
            raise InputError(f"can't write {path}", got=text, do="choose a place you may write to") from error
        raise _write_error(path, text, full=error.errno in _NO_SPACE) from error
    except _safetensor_error() as error:
        text = str(error)
        if "os error" not in text:
            raise
        raise _write_error(path, text, full="os error 28" in text) from error  # 28 is ENOSPC


def _write_error(path: Path, text: str, full: bool) -> PKEError:
    if full:
        return PKEError(f"can't write {path}: the disk is full", got=text, do="free some space and run it again")
    return PKEError(f"can't write {path}", got=text)


def _safetensor_error() -> type[Exception]:
    """safetensors' own error, which its writer raises in place of OSError. Called only when something was raised."""
    from safetensors import SafetensorError

    return SafetensorError


def cache_folder() -> Path:
    """Where converted models and generated answers are kept; it may not exist yet.

    $PKE_FAST_CACHE, else pke_fast in $XDG_CACHE_HOME or ~/.cache.
    """
    own = os.environ.get("PKE_FAST_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pke_fast"
