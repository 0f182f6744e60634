"""What lets a change of a checkpoint in place survive a kill: a journal beside it, and a lock while it lasts.

The journal is a patch file with the bytes before and after. It is written under another name, synced and renamed before
a weight is touched, and removed when all of them are written, synced and read back. So a kill leaves one of these:

- the unfinished journal: nothing was changed, and it is discarded;
- the journal, all weights as they were to be: they are, and the journal goes;
- the journal, some weights changed or half of one: the old bytes are put back.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from pke_fast import patch_file
from pke_fast.errors import InputError, PatchError, PKEError
from pke_fast.files import explained_write, remove, sync_folder
from pke_fast.patch import Patch
from pke_fast.shards import check_folder, read_checkpoint
from pke_fast.stored import Target, find_targets, read_neurons, verify, write_neurons

JOURNAL = ".pke-fast-journal"
UNFINISHED = ".pke-fast-journal.unfinished"
COPY = ".pke-fast-copy"  # of a shard, until it takes the shard's place


@dataclass(frozen=True)
class Recovery:
    """What was done about an interrupted change of a checkpoint.

    Attributes:
        outcome: ``rolled back`` (to the old weights), ``completed`` (all were new) or ``discarded`` (none was changed).
        message: the same for a reader, with the name of the patch.
    """

    outcome: str
    message: str


def recover(folder: str | Path) -> Recovery | None:
    """Ends what an interrupted change left in a checkpoint folder. None where nothing was left.

    Raises:
        InputError: another process is changing the checkpoint at this moment, or it can't be written to.
        PatchError: the journal doesn't belong to these weights, or is damaged; nothing was changed.
        PKEError: an error of the system; the journal stays.
    """
    folder = Path(os.path.realpath(folder))
    if not is_interrupted(folder):
        return None
    with _held(folder, exclusive=True):
        return _recover(folder)


def is_interrupted(folder: Path) -> bool:
    """Whether a change of the checkpoint was interrupted, or is going on."""
    return any((folder / name).exists() for name in (JOURNAL, UNFINISHED, COPY))


@contextmanager
def reading(folder: Path) -> Iterator[Recovery | None]:
    """While it lasts, no other pke-fast changes the checkpoint; what was left of a change is ended first.

    Where the file system has no locks, there is none.
    """
    check_folder(folder)
    recovered = recover(folder)
    with _held(folder, exclusive=False):
        yield recovered


@contextmanager
def changing(folder: Path) -> Iterator[Recovery | None]:
    """While it lasts, no other pke-fast reads or changes the checkpoint; what was left of a change is ended first."""
    check_folder(folder)
    with _held(folder, exclusive=True):
        yield _recover(folder) if is_interrupted(folder) else None


@contextmanager
def journaled(folder: Path, targets: Sequence[Target], name: str, revert: bool) -> Iterator[None]:
    """While it lasts, the targets' neurons may be written; an exception puts the old ones back.

    Args:
        targets: what will change, in a checkpoint that holds the old values now (the new ones with `revert`).
        name: of the patch, for the messages of a recovery.

    Raises:
        PKEError: the old weights could not be put back after an exception; the journal stays.
    """
    parts = tuple(t.part if not revert else replace(t.part, old=t.part.new, new=t.part.old) for t in targets)
    targets = [Target(part, target.tensor) for part, target in zip(parts, targets, strict=True)]
    places = [_place(target) for target in targets]
    parts = tuple(target.part for target in targets)
    journal = Patch(parts, {"journal": {"patch": name, "reverted": revert, "tensors": places}})
    try:
        _write(folder / UNFINISHED, journal)
        os.replace(folder / UNFINISHED, folder / JOURNAL)
        sync_folder(folder)
    except BaseException:
        for left in (UNFINISHED, JOURNAL):
            remove(folder / left)
        raise
    try:
        yield
        os.unlink(folder / JOURNAL)
    except BaseException as error:
        if (folder / JOURNAL).exists():
            try:
                _put_back(folder, targets)
            except (OSError, PKEError, KeyboardInterrupt) as second:
                raise PKEError(
                    f"the checkpoint {folder} is half changed: the old weights could not be put back",
                    got=f"{error!r}, then {second!r}",
                    do=f"run pke-fast recover {folder}; {JOURNAL} in it has the old weights",
                ) from error
        raise
    sync_folder(folder)


def _recover(folder: Path) -> Recovery:
    journal = folder / JOURNAL
    with explained_write(folder):
        for left in (UNFINISHED, COPY):
            remove(folder / left)
        sync_folder(folder)
        if not journal.exists():
            return Recovery("discarded", f"a change of {folder} was interrupted before any weight was touched")
        patch, targets = _read(folder, journal)
        name = f"{'revert' if patch.meta['journal']['reverted'] else 'apply'} of {patch.meta['journal']['patch']}"
        if _state(folder, targets) == "new":
            with _opened(folder, targets, "r+") as files:
                _sync(files)
            os.unlink(journal)
            sync_folder(folder)
            return Recovery("completed", f"{name} on {folder} was interrupted when all was written; it is complete now")
        _put_back(folder, targets)
        return Recovery("rolled back", f"{name} on {folder} was interrupted; the weights are as they were before it")


def _read(folder: Path, journal: Path) -> tuple[Patch, list[Target]]:
    """The journal, and the tensors it is about: they must be where they were."""
    try:
        patch = Patch.load(journal)
    except PatchError as error:
        raise PatchError(
            f"the journal {journal} of an interrupted change is damaged",
            expected="the old weights in it",
            got=f"{error.what}: {error.got}",
            do="get the checkpoint anew: it may be half changed",
        ) from error
    try:
        places = patch.meta["journal"]["tensors"]
    except (KeyError, TypeError) as error:
        raise PatchError(f"{journal} is not a journal", got="another patch", do="move it elsewhere") from error
    targets = find_targets(read_checkpoint(folder), patch, folder)
    if [_place(target) for target in targets] != places:
        raise _foreign(journal, "shards whose tensors are elsewhere than when it was written")
    return patch, targets


def _state(folder: Path, targets: Sequence[Target]) -> str:
    """``new`` where all bytes are, else ``between``; PatchError where any byte is neither old nor new."""
    new = True
    with _opened(folder, targets, "r") as files:
        for file, target in zip(files, targets, strict=True):
            found, old, after = (
                v.view(torch.uint8) for v in (read_neurons(file, target), target.part.old, target.part.new)
            )
            if bool(((found != old) & (found != after)).any()):
                raise _foreign(
                    folder / JOURNAL, f"weights in {target.tensor.name} that are neither the old nor the new"
                )
            new = new and torch.equal(found, after)
    return "new" if new else "between"


def _put_back(folder: Path, targets: Sequence[Target]) -> None:
    with _opened(folder, targets, "r+") as files:
        for file, target in zip(files, targets, strict=True):
            write_neurons(file, target, target.part.old)
        _sync(files)
        for file, target in zip(files, targets, strict=True):
            verify(file, target, target.part.old)
    os.unlink(folder / JOURNAL)
    sync_folder(folder)


def _write(path: Path, journal: Patch) -> None:
    with FileIO(path, "w") as file:
        for piece in patch_file.pieces(journal.content()):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
        os.fsync(file.fileno())


@contextmanager
def _opened(folder: Path, targets: Sequence[Target], mode: str) -> Iterator[list[FileIO]]:
    """The shard of each target."""
    with ExitStack() as stack:
        shards = {target.tensor.shard for target in targets}
        files = {shard: stack.enter_context(FileIO(folder / shard, mode)) for shard in sorted(shards)}
        yield [files[target.tensor.shard] for target in targets]


def _sync(files: Sequence[FileIO]) -> None:
    for number in sorted({file.fileno() for file in files}):
        os.fsync(number)


def _place(target: Target) -> dict[str, Any]:
    return {**asdict(target.tensor), "shape": list(target.tensor.shape)}


def _foreign(journal: Path, got: str) -> PatchError:
    return PatchError(
        f"the journal {journal} of an interrupted change does not belong to the weights beside it",
        expected="the checkpoint as the interruption left it",
        got=got,
        do="if another checkpoint was put there since, delete the journal; else get the checkpoint anew",
    )


@contextmanager
def _held(folder: Path, exclusive: bool) -> Iterator[None]:
    """A lock of the folder, which the system releases when the process ends, however it ends."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"can't read the checkpoint {folder}", got=error.strerror) from error
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another pke-fast is {'using' if exclusive else 'changing'} the checkpoint {folder}",
                do="wait until it has ended",
            ) from error
        except OSError as error:  # a file system without locks: reading needs none where nobody can write in place
            if exclusive:
                raise InputError(
                    f"the checkpoint {folder} can't be locked, so it can't be changed in place",
                    got=str(error.strerror),
                    do="give --out instead of --in-place",
                ) from error
        yield
    finally:
        os.close(handle)
