"""Patches applied to a checkpoint on disk, one tensor in memory at a time and without loading the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pke_fast.errors import InputError, PatchError, PKEError
from pke_fast.files import atomic_folder, check_output_folder
from pke_fast.patch import DTYPES, LayerPatch, Patch, check_weight, differing
from pke_fast.shards import StoredTensor, read_checkpoint

_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_BITS: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<u4"), "bf16": np.dtype("<u2"), "fp16": np.dtype("<u2")}
_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".gguf"}
_LINK_FROM = (
    16 * 2**20
)  # bytes; smaller files are what people edit by hand, and a link would change the source with them


@dataclass(frozen=True)
class _Target:
    """A layer of the patch and the stored tensor that it changes."""

    part: LayerPatch
    tensor: StoredTensor


def patch_checkpoint(
    source: str | Path, patch: Patch, out: str | Path, *, revert: bool = False, force: bool = False
) -> dict[str, Any]:
    """Writes a copy of a checkpoint folder with the patch applied, or taken back with `revert`; exact to the bit.

    Every old value is compared before anything is written; every new one is read back. Memory: one tensor. Shards that
    don't change, and other files of 16 MiB or more, are hard-linked where the disk allows it, and share their bytes
    with the source: replace them rather than write into them. Hidden files are left out. The source is never changed.

    Args:
        source: a folder with model.safetensors, or with shards and model.safetensors.index.json.
        out: a new or an empty folder; with `force` any other than the source is replaced as a whole.

    Returns:
        ``out``, ``reverted``, ``neurons``, ``rewritten`` ({shard: [tensor names]}), the names of the ``linked`` and
        ``copied`` files, and ``other_weights``: those among them that may hold weights besides the checkpoint's own
        (a second format, an adapter), which the patch left as they are.

    Raises:
        InputError: `source` or `out` can't be used.
        PatchError: the checkpoint lacks a weight of the patch, or has it in another shape, dtype or with other values.
        PKEError: the disk is full, or another error of the system. In every case nothing is left behind.
    """
    source, out = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    tensors = read_checkpoint(source)
    _check_apart(source, out)
    check_output_folder(out, force)
    targets = [_Target(part, _find(tensors, part, source)) for part in patch.layers]
    patch.check([_read(source, target) for target in targets], revert, f"the checkpoint {source}")
    shards = {tensor.shard for tensor in tensors.values()}
    rewritten: dict[str, list[str]] = {}
    for target in targets:
        rewritten.setdefault(target.tensor.shard, []).append(target.tensor.name)
    with atomic_folder(out, force) as folder:
        linked, copied = _share(source, folder, set(rewritten))
        for shard in rewritten:
            shutil.copyfile(source / shard, folder / shard)
        for target in targets:
            _write(folder, target, target.part.old if revert else target.part.new)
        for target in targets:
            _verify(folder, target, target.part.old if revert else target.part.new)
    return {
        "out": str(out),
        "reverted": revert,
        "neurons": patch.n_neurons,
        "rewritten": rewritten,
        "linked": linked,
        "copied": copied,
        "other_weights": [name for name in linked + copied if Path(name).suffix in _WEIGHTS and name not in shards],
    }


def _check_apart(source: Path, out: Path) -> None:
    if source == out or source in out.parents or out in source.parents:
        raise InputError(
            f"the output folder {out} is {'the checkpoint itself' if source == out else 'inside or around it'}",
            expected="a folder apart from the checkpoint, which is never changed",
            got=f"a checkpoint in {source}",
            do="choose another --out",
        )


def _find(tensors: dict[str, StoredTensor], part: LayerPatch, source: Path) -> StoredTensor:
    """The stored tensor of a parameter. A checkpoint of the base model alone lacks the prefix of the loaded model's
    names, or the loaded model lacks a prefix of the checkpoint's."""
    wanted = part.weight
    names = [wanted] if wanted in tensors else []
    names = names or [name for name in tensors if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(names) != 1:
        raise PatchError(
            f"the checkpoint {source} has no tensor {wanted}, which the patch changes (layer {part.layer})",
            expected="that name, or one that differs only by a prefix",
            got=f"{len(names)} such names: {', '.join(names[:4])}"
            if names
            else f"names such as {next(iter(tensors), None)}",
            do="use the checkpoint that was edited",
        )
    tensor = tensors[names[0]]
    check_weight(part, f"the checkpoint {source}", tensor.shape, _DTYPES.get(tensor.dtype, tensor.dtype))
    return tensor


def _load(folder: Path, target: _Target) -> np.ndarray[Any, Any]:
    """The whole tensor as unsigned integers of its size. Read, not mapped: a full or failing disk is then an error."""
    tensor, bits = target.tensor, _BITS[DTYPES[target.part.old.dtype]]
    values = np.fromfile(folder / tensor.shard, bits, tensor.size // bits.itemsize, offset=tensor.offset)
    return values.reshape(tensor.shape)


def _read(folder: Path, target: _Target) -> Tensor:
    """The neurons' weights in the checkpoint, ``[n, d]`` in the patch's dtype."""
    part = target.part
    values = np.take(_load(folder, target), part.neurons.numpy(), axis=part.axis)
    values = np.ascontiguousarray(values if part.axis == 0 else values.T)
    return torch.from_numpy(values.view(np.int32 if values.itemsize == 4 else np.int16)).view(part.old.dtype)


def _write(folder: Path, target: _Target, new: Tensor) -> None:
    part = target.part
    values = _load(folder, target)
    bits = new.view(torch.int32 if values.itemsize == 4 else torch.int16).numpy().view(values.dtype)
    if part.axis == 0:
        values[part.neurons.numpy()] = bits
    else:
        values[:, part.neurons.numpy()] = bits.T
    with (folder / target.tensor.shard).open("r+b") as file:
        file.seek(target.tensor.offset)
        file.write(values.data)


def _verify(folder: Path, target: _Target, new: Tensor) -> None:
    if differing(_read(folder, target), new):
        raise PKEError(
            f"{target.tensor.shard} does not hold what was written to it ({target.tensor.name}); nothing was kept",
            do="check the disk",
        )


def _share(source: Path, folder: Path, without: set[str]) -> tuple[list[str], list[str]]:
    """Links or copies every file but those of `without`. Returns the names of the linked and of the copied ones."""
    linked, copied = [], []
    for path in _files(source):
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


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # caches and repositories, not parts of the checkpoint
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another disk, a file system without links, or somebody else's file
        return False
    return True
