"""Patches applied to a checkpoint where it is: the neurons' bytes alone, old or new as a whole, whatever happens."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError
from pke_fast.files import explained_write, remove, sync_folder, visible_files
from pke_fast.journal import COPY, changing, journaled
from pke_fast.patch import Patch
from pke_fast.shards import other_weights, read_checkpoint
from pke_fast.stored import by_shard, find_targets, read_all, verify, write_neurons


def patch_in_place(
    folder: str | Path, patch: Patch, *, revert: bool = False, name: str | None = None
) -> dict[str, Any]:
    """Applies the patch to a checkpoint folder in place, or takes it back with `revert`; exact to the bit.

    Every old value is compared before anything is written. The old bytes then go into a journal in the folder, so that
    a kill or a power failure at any moment leaves a checkpoint that the next pke-fast command on it puts right: old or
    new, never between. Memory: a few times the patch's size and a few MB. A shard that is hard-linked elsewhere is
    first replaced by a copy of its own, since the other checkpoints would change with it. A program that has a shard
    mapped into its memory sees the weights change.

    Args:
        folder: a checkpoint with model.safetensors, or with shards and model.safetensors.index.json.
        name: of the patch, for what a recovery says; by default that of the model it was made from.

    Returns:
        ``out`` (the folder), ``in_place``, ``reverted``, ``neurons``, ``rewritten`` ({shard: [tensor names]}),
        ``own_copies`` (shards that were hard-linked), ``recovered`` (see `Recovery.outcome`; None where nothing was)
        and ``other_weights``, as `patch_checkpoint`.

    Raises:
        InputError: `folder` can't be used or written to, is in use, or has a shard that is a symbolic link.
        PatchError: the checkpoint lacks a weight of the patch, or has it in another shape, dtype or with other values.
        PKEError: the disk is full, or another error of the system. In every case the weights are the old ones.
    """
    folder = Path(os.path.realpath(folder))
    base = patch.meta.get("base")
    name = name or f"a patch of {base.get('name') if isinstance(base, dict) else base}"
    with changing(folder) as recovered:
        tensors = read_checkpoint(folder)
        targets = find_targets(tensors, patch, folder)
        rewritten = by_shard(targets)
        for shard in rewritten:
            _check_writable(folder, shard)
        patch.check(read_all(folder, targets), revert, f"the checkpoint {folder}")
        shards = {tensor.shard for tensor in tensors.values()}
        with explained_write(folder):
            own_copies = [shard for shard in rewritten if _copied_if_linked(folder, shard)]
            with ExitStack() as stack:
                files = {shard: stack.enter_context(FileIO(folder / shard, "r+")) for shard in rewritten}
                with journaled(folder, targets, name, revert):
                    after = [target.part.old if revert else target.part.new for target in targets]
                    for target, new in zip(targets, after, strict=True):
                        write_neurons(files[target.tensor.shard], target, new)
                    for file in files.values():
                        os.fsync(file.fileno())
                    for target, new in zip(targets, after, strict=True):
                        verify(files[target.tensor.shard], target, new)
    return {
        "out": str(folder),
        "in_place": True,
        "reverted": revert,
        "neurons": patch.n_neurons,
        "rewritten": rewritten,
        "own_copies": own_copies,
        "recovered": recovered.outcome if recovered else None,
        "other_weights": other_weights((str(path.relative_to(folder)) for path in visible_files(folder)), shards),
    }


def _check_writable(folder: Path, shard: str) -> None:
    path = folder / shard
    if path.is_symlink():
        raise InputError(
            f"the shard {shard} is a symbolic link, so it can't be changed in place",
            expected="a checkpoint with files of its own",
            got=f"a link to {os.path.realpath(path)}, which is part of something else (a hub's cache, for one)",
            do="give --out DIR instead of --in-place",
        )
    if not os.access(path, os.W_OK) or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"can't change {path} in place",
            got="no permission to write",
            do="give --out DIR instead of --in-place, or make the folder and its shards writable",
        )


def _copied_if_linked(folder: Path, shard: str) -> bool:
    """Gives a shard that has other names bytes of its own; the others keep theirs. A kill leaves the old or the new."""
    path, copy = folder / shard, folder / COPY
    if path.stat().st_nlink == 1:
        return False
    try:
        shutil.copyfile(path, copy)
        shutil.copymode(path, copy)
        with FileIO(copy, "r+") as file:
            os.fsync(file.fileno())
        os.replace(copy, path)
    except BaseException:
        remove(copy)
        raise
    sync_folder(folder)
    return True
