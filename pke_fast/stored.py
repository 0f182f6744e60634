"""The neurons of a patch in a checkpoint on disk: found by name, then read and written in bands of half a MB."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pke_fast.dtypes import NAMES, STORED, bits_of
from pke_fast.errors import PatchError, PKEError
from pke_fast.layer_patch import LayerPatch, check_weight, differing
from pke_fast.patch import Patch
from pke_fast.shards import StoredTensor

# Bytes read or written at once. At 1 MiB and more, writing was up to six times slower (Linux 6.18, ext4: huge pages).
BAND = 512 * 2**10
BITS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}


@dataclass(frozen=True)
class Target:
    """A part of a patch and the stored tensor that it changes, which another part may change at other places."""

    part: LayerPatch
    tensor: StoredTensor


def find_targets(tensors: dict[str, StoredTensor], patch: Patch, source: Path) -> list[Target]:
    """Where each part of the patch is in the checkpoint.

    Raises:
        PatchError: the checkpoint lacks a weight of the patch, or has it in another shape or dtype.
    """
    return [_find(tensors, part, source) for part in patch.layers]


def by_shard(targets: Iterable[Target]) -> dict[str, list[str]]:
    """The names of the tensors that change, each once, by shard."""
    found: dict[str, list[str]] = {}
    for target in targets:
        names = found.setdefault(target.tensor.shard, [])
        if target.tensor.name not in names:
            names.append(target.tensor.name)
    return found


def names_of(tensors: Iterable[str], wanted: str) -> list[str]:
    """The stored names of a parameter: its own, else those that differ by a prefix.

    A checkpoint of the base model alone lacks the prefix of the loaded model's names, or the loaded model lacks a
    prefix of the checkpoint's.
    """
    names = list(tensors)
    if wanted in names:
        return [wanted]
    return [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]


def _find(tensors: dict[str, StoredTensor], part: LayerPatch, source: Path) -> Target:
    names = names_of(tensors, part.weight)
    if len(names) != 1:
        raise PatchError(
            f"the checkpoint {source} has no tensor {part.weight}, which the patch changes (layer {part.layer})",
            expected="that name, or one that differs only by a prefix",
            got=f"{len(names)} such names: {', '.join(names[:4])}"
            if names
            else f"names such as {next(iter(tensors), None)}",
            do="use the checkpoint that was edited",
        )
    tensor = tensors[names[0]]
    dtype = STORED.get(tensor.dtype)
    check_weight(part, f"the checkpoint {source}", tensor.shape, NAMES[dtype] if dtype else tensor.dtype)
    return Target(part, tensor)


def read_all(folder: Path, targets: Sequence[Target]) -> list[Tensor]:
    """The neurons' weights in the checkpoint, ``[n, d]`` for each target in its patch's dtype."""
    values = []
    for target in targets:
        with FileIO(folder / target.tensor.shard) as file:
            values.append(read_neurons(file, target))
    return values


def read_neurons(file: FileIO, target: Target) -> Tensor:
    """The neurons' weights in an open shard, ``[n, d]`` in the patch's dtype."""
    part, tensor = target.part, target.tensor
    ids, bits = part.index.numpy(), BITS[tensor.dtype]
    values = np.empty(part.old.shape, bits)
    if part.axis == 0:
        for row, first, end in _runs(ids, tensor, bits):
            values[row : row + end - first] = _read_rows(file, tensor, bits, first, end)
    else:
        for first, end in row_bands(tensor.shape[0], tensor.shape[1] * bits.itemsize):
            values[:, first:end] = np.take(_read_rows(file, tensor, bits, first, end), ids, axis=1).T
    return torch.from_numpy(values.view(f"i{bits.itemsize}")).view(part.old.dtype)


def write_neurons(file: FileIO, target: Target, new: Tensor, source: FileIO | None = None) -> None:
    """Writes ``[n, d]`` in the patch's dtype over the neurons' weights, in a shard that is open to read and write.

    Rows are written by themselves. Columns are two or four bytes apart in every row, so that whole rows are written,
    with the other neurons' bytes as they are, or as they are in `source`: then the whole tensor is written.
    """
    part, tensor = target.part, target.tensor
    ids, bits = part.index.numpy(), BITS[tensor.dtype]
    values = new.view(bits_of(new.dtype)).numpy().view(bits)
    row_bytes = tensor.shape[1] * bits.itemsize
    if part.axis == 0:
        if source is not None:
            _copy_range(source, file, tensor.offset, tensor.offset + tensor.size)
        for row, first, end in _runs(ids, tensor, bits):
            write_at(file, tensor.offset + first * row_bytes, values[row : row + end - first])
        return
    for first, end in row_bands(tensor.shape[0], tensor.shape[1] * bits.itemsize):
        band = _read_rows(source or file, tensor, bits, first, end)
        band[:, ids] = values[:, first:end].T
        write_at(file, tensor.offset + first * row_bytes, band)


def copy_shard(shard: Path, copy: Path, targets: Sequence[tuple[Target, Tensor]]) -> None:
    """Copies a shard with other weights for the targets' neurons, ``[n, d]`` each. Every byte is written about once."""
    with FileIO(shard) as source, FileIO(copy, "w+") as file:
        position = 0
        for target, new in sorted(targets, key=lambda pair: pair[0].tensor.offset):
            begun = target.tensor.offset < position  # by another part of a fused weight
            _copy_range(source, file, position, target.tensor.offset)
            write_neurons(file, target, new, None if begun else source)
            position = target.tensor.offset + target.tensor.size
        _copy_range(source, file, position, shard.stat().st_size)


def verify(file: FileIO, target: Target, new: Tensor) -> None:
    """Reads back what was written; PKEError where it isn't that."""
    if differing(read_neurons(file, target), new):
        raise PKEError(
            f"{target.tensor.shard} does not hold what was written to it ({target.tensor.name}); nothing was kept",
            do="check the disk",
        )


def row_bands(rows: int, row_bytes: int, band: int = BAND) -> Iterator[tuple[int, int]]:
    """First and end of bands of whole rows, of so many bytes or of one row."""
    step = max(1, band // max(1, row_bytes))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def read_at(file: FileIO, offset: int, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Fills `values` from the file. Read, not mapped: a failing disk is then an error.

    Raises:
        PKEError: the file ends before that.
    """
    file.seek(offset)
    rest = values.reshape(-1).view(np.uint8).data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise PKEError(f"{file.name} became shorter while it was read", do="let nothing else write to it")
        rest = rest[count:]
    return values


def write_at(file: FileIO, offset: int, values: np.ndarray[Any, Any]) -> None:
    """Writes all of `values` at the offset."""
    rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    while rest:
        count = os.pwrite(file.fileno(), rest[:BAND], offset)
        rest, offset = rest[count:], offset + count


def _copy_range(source: FileIO, file: FileIO, first: int, end: int) -> None:
    for start in range(first, end, BAND):
        write_at(file, start, read_at(source, start, np.empty(min(BAND, end - start), np.uint8)))


def _read_rows(file: FileIO, tensor: StoredTensor, bits: np.dtype[Any], first: int, end: int) -> np.ndarray[Any, Any]:
    width = tensor.shape[1]
    return read_at(file, tensor.offset + first * width * bits.itemsize, np.empty((end - first, width), bits))


def _runs(ids: np.ndarray[Any, Any], tensor: StoredTensor, bits: np.dtype[Any]) -> Iterator[tuple[int, int, int]]:
    """Rows that are neighbours, in bands: the place in `ids`, the first row and the end."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True):
        for first, end in row_bands(stop - start, tensor.shape[1] * bits.itemsize):
            yield start + first, int(ids[start]) + first, int(ids[start]) + end
