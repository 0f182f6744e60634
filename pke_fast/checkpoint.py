"""Patches applied to a copy of a checkpoint on disk, a few MB in memory at a time and without loading the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from pke_fast.files import atomic_folder, check_output_folder, visible_files
from pke_fast.journal import reading
from pke_fast.patch import Patch
from pke_fast.pickled import convert, is_pickled
from pke_fast.shards import other_weights, read_checkpoint
from pke_fast.stored import by_shard, copy_shard, find_targets, read_all, verify, write_neurons

# In bytes. Smaller files are what people edit by hand, and a link would change the source with them.
_LINK_FROM = 16 * 2**20


def patch_checkpoint(
    source: str | Path,
    patch: Patch,
    out: str | Path,
    *,
    revert: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
    keep: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Writes a copy of a checkpoint folder with the patch applied, or taken back with `revert`; exact to the bit.

    Every old value is compared before anything is written; every new one is read back. Memory: the patch's size and a
    few MB. Shards that don't change, and other files of 16 MiB or more, are hard-linked where the disk allows it, and
    share their bytes with the source: replace them rather than write into them. Hidden files are left out. The source
    is never changed, but that an interrupted change of it is ended first (journal.py).

    Args:
        source: a folder with model.safetensors, or with shards and model.safetensors.index.json.
        out: a new or an empty folder apart from the source; with `force` any such is replaced as a whole.
        allow_pickle: convert a pytorch_model.bin, where there are no safetensors (pickled.py).
        keep: files and folders that `out` has to be apart from too, such as the patch's file.

    Returns:
        ``out``, ``reverted``, ``neurons``, ``rewritten`` ({shard: [tensor names]}), the names of the ``linked`` and
        ``copied`` files, ``other_weights``: those among them that may hold weights besides the checkpoint's own (a
        second format, an adapter), which the patch left as they are, ``recovered``: see `Recovery.outcome`; None where
        the source had no interrupted change; and of pickled weights, the names of the ``converted`` files.

    Raises:
        InputError: `source` or `out` can't be used.
        PatchError: the checkpoint lacks a weight of the patch, or has it in another shape, dtype or with other values.
        PKEError: the disk is full, or another error of the system. In every case nothing is left behind.
    """
    source, out = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    check_output_folder(out, force, keep, [source])
    with reading(source) as recovered:
        make = _converted_copy if allow_pickle and is_pickled(source) else _patched_copy
        done = make(source, patch, out, revert, force)
    return {
        "out": str(out),
        "reverted": revert,
        "neurons": patch.n_neurons,
        **done,
        "recovered": recovered.outcome if recovered else None,
    }


def _patched_copy(source: Path, patch: Patch, out: Path, revert: bool, force: bool) -> dict[str, Any]:
    tensors = read_checkpoint(source)
    targets = find_targets(tensors, patch, source)
    patch.check(read_all(source, targets), revert, f"the checkpoint {source}")
    shards = {tensor.shard for tensor in tensors.values()}
    rewritten = by_shard(targets)
    with atomic_folder(out, force) as folder:
        linked, copied = _share(source, folder, set(rewritten))
        after = [(target, target.part.old if revert else target.part.new) for target in targets]
        for shard in rewritten:
            mine = [(target, new) for target, new in after if target.tensor.shard == shard]
            copy_shard(source / shard, folder / shard, mine)
            with FileIO(folder / shard) as file:
                for target, new in mine:
                    verify(file, target, new)
    others = other_weights(linked + copied, shards)
    return {"rewritten": rewritten, "linked": linked, "copied": copied, "other_weights": others}


def _converted_copy(source: Path, patch: Patch, out: Path, revert: bool, force: bool) -> dict[str, Any]:
    """As `_patched_copy`, of pickled weights: nothing is shared with the source, and every shard is new."""
    with atomic_folder(out, force) as folder:
        converted = convert(source, folder)
        linked, copied = _share(source, folder, set(converted))
        tensors = read_checkpoint(folder)
        targets = find_targets(tensors, patch, source)
        patch.check(read_all(folder, targets), revert, f"the checkpoint {source}")
        rewritten: dict[str, list[str]] = {tensor.shard: [] for tensor in tensors.values()} | by_shard(targets)
        for target in targets:
            new = target.part.old if revert else target.part.new
            with FileIO(folder / target.tensor.shard, "r+") as file:
                write_neurons(file, target, new)
                verify(file, target, new)
    others = other_weights(linked + copied, set())
    return {
        "rewritten": rewritten,
        "linked": linked,
        "copied": copied,
        "converted": converted,
        "other_weights": others,
    }


def _share(source: Path, folder: Path, without: set[str]) -> tuple[list[str], list[str]]:
    """Links or copies every file but those of `without`. Returns the names of the linked and of the copied ones."""
    linked, copied = [], []
    for path in visible_files(source):
        name = path.relative_to(source)
        if str(name) in without:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        real = Path(os.path.realpath(path))  # a hub cache holds links to its blobs
        large = path.suffix == ".safetensors" or real.stat().st_size >= _LINK_FROM
        if large and _link(real, folder / name):
            linked.append(str(name))
        else:
            shutil.copyfile(real, folder / name)
            copied.append(str(name))
    return linked, copied


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another disk, a file system without links, or somebody else's file
        return False
    return True
